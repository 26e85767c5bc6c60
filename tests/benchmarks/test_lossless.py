"""What is gained by drafts: the formula, the prompts, and a run on a tiny model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import lossless, models
from benchmarks.lossless import hostile, steps, tasks
from benchmarks.lossless.accounts import Block, account


@given(
    st.floats(0, 0.99), st.integers(1, 5), st.floats(0.1, 2, allow_subnormal=False), st.floats(1, 3)
)
def test_the_speed_up_of_all_that_can_happen(
    accepted: float, count: int, draft: float, verify: float
) -> None:
    """The oracle: every outcome of a block with its probability."""
    tokens = 0.0
    for stand in itertools.product((True, False), repeat=count):
        chance = 1.0
        for one in stand:
            chance *= accepted if one else 1 - accepted
        tokens += chance * (1 + sum(itertools.takewhile(bool, stand)))
    expected = tokens / (count * draft + verify)
    assert steps.speedup(accepted, count, draft, verify) == pytest.approx(expected)


@pytest.mark.parametrize("name", tasks.TARGETS)
def test_prompts_are_the_same_every_time(name: str) -> None:
    made = tasks.prompts(name, 3, 2000)
    assert made == tasks.prompts(name, 3, 2000)
    assert len(set(made)) == 3
    assert all(len(text) < 3000 for text in made)


@pytest.mark.parametrize("name", hostile.KINDS)
def test_hostile_prompts_are_the_same_every_time(name: str) -> None:
    made = hostile.prompts(name, 3, 500)
    assert made == hostile.prompts(name, 3, 500)
    assert len(set(made)) == 3
    assert all(100 < len(text) < 700 for text in made)


# Accounts of answers within a bound --------------------------------------------------------------


def likely(*chances: float) -> torch.Tensor:
    return torch.tensor(chances, dtype=torch.float64).log()


def nats(full: tuple[float, ...], draft: tuple[float, ...]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(full, draft, strict=True))


P, Q, R = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.6, 0.2, 0.2)
FULL = torch.stack([likely(*P)] * 5)


def test_an_account_by_hand() -> None:
    """Of five tokens two are drafts, of which one is refused; a third one is the full model's."""
    text = torch.tensor([0, 0, 1, 0, 0])
    blocks = [
        Block(1, torch.tensor([0, 1]), torch.stack((likely(*R), likely(*Q)))),
        Block(4, torch.tensor([2]), likely(*Q).unsqueeze(0)),
    ]
    both = nats(P, R) + nats(P, Q)
    found = account(FULL, text, blocks, 0.2)
    assert found.mean == pytest.approx(both / 5)
    assert found.drafted == pytest.approx(both / 5)
    assert found.fell_back, "the last draft is not in the text"
    assert not account(FULL, text, blocks[:1], 0.2).fell_back


def test_a_draft_beyond_the_bound_is_free_where_the_full_model_says_the_same() -> None:
    text, dear = torch.tensor([0, 0, 0, 0, 0]), likely(0.01, 0.01, 0.98).unsqueeze(0)
    found = account(FULL, text, [Block(1, torch.tensor([0]), dear)], 0.01)
    assert (found.mean, found.fell_back) == (0.0, True)
    assert found.drafted == pytest.approx(nats(P, (0.01, 0.01, 0.98)) / 5)


@pytest.mark.parametrize("drafted", [True, False])
def test_a_bound_that_was_not_kept_shows(drafted: bool) -> None:
    """The companion: a token that neither the bound nor the full model allows is counted."""
    text = torch.tensor([0, 1, 0, 0, 0])
    blocks = [Block(1, torch.tensor([1]), likely(*Q).unsqueeze(0))] if drafted else []
    expected = nats(P, Q) if drafted else -math.log(0.25)
    assert account(FULL, text, blocks, 0.01).mean == pytest.approx(expected / 5)
    assert account(FULL, text, blocks, 0.01).mean > 0.01


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(models, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(steps, "_TINY", {32: 1.5})
    models.pair.cache_clear()
    yield
    models.pair.cache_clear()


@pytest.mark.slow
def test_steps_on_a_tiny_model(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    result: dict[str, Any] = lossless.measure(only=("steps",))
    whats = [row["what"] for row in result["steps"]]
    assert whats[0] == "8 tokens verified on 32: decode step"
    (looked_up,) = (what for what in whats if "drafts that are looked up" in what)
    assert whats.index(looked_up) == 1 + len(steps._TARGETS)
    assert len(whats) == 2 + 2 * len(steps._TARGETS)
    assert all(row["ratio"] > 0 for row in result["steps"] if row["ratio"] is not None)
    printed = capsys.readouterr().err
    assert printed.strip() == lossless.summary(result)
    assert "target 1.5" in printed
