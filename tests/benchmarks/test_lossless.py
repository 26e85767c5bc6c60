"""What is gained by drafts: the formula, the prompts, and a run on a tiny model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import lossless, models
from benchmarks.lossless import steps, tasks


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
    assert len(whats) == 1 + 2 * len(steps._TARGETS)
    assert all(row["ratio"] > 0 for row in result["steps"] if row["ratio"] is not None)
    printed = capsys.readouterr().err
    assert printed.strip() == lossless.summary(result)
    assert "target 1.5" in printed
