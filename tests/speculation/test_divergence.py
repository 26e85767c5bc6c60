"""What stands by a bound of divergence, beside the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.speculation.acceptance import Greedy
from adaskip_fx.speculation.divergence import Within, divergence
from adaskip_fx.speculation.options import Bounded
from adaskip_fx.speculation.proposals import Drafts
from adaskip_fx.speculation.statistics import DraftStats


def test_it_is_torchs() -> None:
    full, draft = torch.randn(2, 3, 4, 50, dtype=torch.float64).unbind(0)
    ours, theirs = (torch.log_softmax(t, -1) for t in (full, draft))
    expected = torch.nn.functional.kl_div(theirs, ours, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(full, draft), expected)
    assert divergence(full, full).abs().max() < 1e-12


def test_tokens_that_cannot_be_add_nothing() -> None:
    full, draft = torch.zeros(2, 1, 1, 4).unbind(0)
    full, draft = full.clone(), draft.clone()
    full[..., 1] = draft[..., 1] = full[..., 2] = -torch.inf
    assert divergence(full, draft).item() == pytest.approx(torch.tensor(3 / 2).log().item())


def by_definition(
    costs: list[float], agrees: list[bool], spent: float, tokens: int, most: float
) -> tuple[list[bool], float]:
    """Which drafts of one row stand, and what is paid up to the first that does not."""
    stand = list[bool]()
    for cost, same in zip(costs, agrees, strict=True):
        tokens += 1
        if spent + cost <= most * tokens:
            spent += cost
            stand.append(True)
        else:
            stand.append(same)
            if not same:
                break
    return stand, spent


@pytest.mark.parametrize("at_once", [True, False])
@given(st.integers(0, 2**16), st.floats(0.01, 1), st.integers(1, 6), st.integers(1, 5))
def test_blocks_one_after_another(at_once: bool, seed: int, most: float, k: int, n: int) -> None:
    torch.manual_seed(seed)
    rule, spent, tokens = Within(Greedy(), most, 1, torch.device("cpu")), 0.0, 0
    for _ in range(n):
        full = torch.randn(1, k, 7)
        logits = full + 0.7 * torch.randn(1, k, 7)
        drafts = Drafts(logits.argmax(-1), logits=logits)
        costs = divergence(full, logits)[0].tolist()
        agrees = (full.argmax(-1) == drafts.tokens)[0].tolist()
        want, spent = by_definition(costs, agrees, spent, tokens, most)
        got = list[bool]()
        for first in [0] if at_once else range(k):
            end = k if at_once else first + 1
            part = full[:, first:end]
            got += rule.accepts(part, drafts.columns(first, end), part)[0].tolist()
            if not all(got):
                break
            if not at_once:
                rule.tokens = rule.tokens + 1
        taken = got.index(False) if False in got else k
        if at_once:
            rule.tokens = rule.tokens + taken
        rule.settle(torch.tensor(taken))
        rule.tokens, tokens = rule.tokens + 1, tokens + taken + 1
        assert taken == (want.index(False) if False in want else k)
        assert rule.tokens.item() == tokens
        assert rule.spent.item() == pytest.approx(spent)
        assert spent <= most * tokens


def test_drafts_of_others_stand_by_the_other_rule_alone() -> None:
    full = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]])
    rule = Within(Greedy(), 100.0, 1, torch.device("cpu"))
    assert rule.accepts(full, Drafts(torch.tensor([[0, 0]])), full).tolist() == [[True, False]]
    rule.settle(torch.tensor(1))
    assert rule.spent.item() == 0


def test_what_is_told_of_it() -> None:
    stats = DraftStats()
    assert "divergence" not in str(stats)
    stats.diverged(0.1, [0.2, 0.0], [10, 5])
    stats.diverged(0.1, [0.5], [10])
    assert stats.divergence == pytest.approx(0.7 / 25)
    assert stats.worst == pytest.approx(0.05)
    assert "0.028 nats a token, 0.05 in the worst row, of at most 0.1" in str(stats)


@pytest.mark.parametrize("most", [0.0, -1.0, float("inf"), float("nan")])
def test_bounds_that_mean_nothing(most: Any) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Bounded(max_divergence=most)
