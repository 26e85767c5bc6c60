"""Policies of other systems: their choices, against lists written by hand and plain loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import EarlyExit, LLMDrop, OnlinePolicy, Policy, ReverseOrder, UnifiedSkip
from tests.support.profiles import layers_of, profile

WHOLE = [UnifiedSkip, EarlyExit, ReverseOrder]

#: Eight of 32 layers (alpha = 4/3), and three of 12, by hand.
CHOICES = [
    (EarlyExit(), 32, 4 / 3, [24, 25, 26, 27, 28, 29, 30, 31]),
    (ReverseOrder(), 32, 4 / 3, [23, 24, 25, 26, 27, 28, 29, 30]),
    (UnifiedSkip(), 32, 4 / 3, [2, 6, 10, 14, 17, 21, 25, 29]),
    (EarlyExit(), 12, 4 / 3, [9, 10, 11]),
    (ReverseOrder(), 12, 4 / 3, [8, 9, 10]),
    (UnifiedSkip(), 8, 4 / 3, [2, 5]),
    (UnifiedSkip(), 4, 4.0, [1, 2, 3]),
    (EarlyExit(protected=True), 12, 4 / 3, [8, 9, 10]),
    (ReverseOrder(protected=True), 6, 2.0, [2, 3, 4]),
    (UnifiedSkip(protected=True), 12, 4 / 3, [3, 6, 9]),
]


@pytest.mark.parametrize(("policy", "layers", "alpha", "chosen"), CHOICES)
def test_choices(policy: Policy, layers: int, alpha: float, chosen: list[int]) -> None:
    assert layers_of(policy.plan(profile(layers), alpha)) == chosen


@given(st.integers(2, 40), st.data())
def test_unified_keeps_layers_at_equal_distances(layers: int, data: st.DataObject) -> None:
    """The first and the last, and gaps that differ by at most one."""
    alpha = data.draw(st.floats(1.0, 2.0))
    gone = layers_of(UnifiedSkip().plan(profile(layers), alpha))
    kept = [i for i in range(layers) if i not in gone]
    assert kept[0] == 0
    assert len(kept) < 2 or kept[-1] == layers - 1
    gaps = {b - a for a, b in pairwise(kept)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("policy", WHOLE)
@given(st.integers(4, 40), st.floats(1.0, 1.3), st.booleans())
def test_as_many_as_asked(policy: type[UnifiedSkip], layers: int, alpha: float, p: bool) -> None:
    plan = policy(protected=p).plan(profile(layers), alpha)
    gone = layers_of(plan)
    assert abs(len(gone) - layers * (1 - 1 / alpha)) <= 0.5 + 1e-6
    assert not p or not {0, 1, layers - 1} & set(gone)


@pytest.mark.parametrize("policy", WHOLE)
def test_what_was_measured_changes_only_the_factors(policy: type[UnifiedSkip]) -> None:
    other = profile(12, {"11.ffn": 0.99, "3.attention": 0.98})
    assert policy().plan(profile(12), 1.3) == policy().plan(other, 1.3)
    plain, scaled = (policy(scaled=c).plan(other, 1.3) for c in (False, True))
    assert plain.skipped("prefill") == scaled.skipped("prefill")
    assert not plain.surrogates.factors
    assert set(scaled.surrogates.factors) == set(scaled.skipped("prefill"))
    assert set(scaled.surrogates.factors.values()) == {0.75}


SIMILAR = {"2.ffn": 0.99, "1.attention": 0.9, "3.attention": 0.95, "0.attention": 0.97}


def test_llm_drop() -> None:
    """3 of 8 sublayers, of attention alone or of both kinds."""
    measured = profile(4, SIMILAR)
    by_which = {
        "attention": ["0.attention", "1.attention", "3.attention"],
        "joint": ["0.attention", "2.ffn", "3.attention"],
    }
    for which, names in by_which.items():
        plan = LLMDrop(which).plan(measured, 1.6)  # type: ignore[arg-type]
        assert [str(s) for s in plan.skipped("prefill")] == names
        assert not plan.surrogates.factors
    scaled = LLMDrop(scaled=True).plan(measured, 1.6)
    assert set(scaled.surrogates.factors.values()) == {0.75}


def test_ties_are_broken_in_stream_order() -> None:
    plan = LLMDrop().plan(profile(4), 4 / 3)
    assert [str(s) for s in plan.skipped("prefill")] == ["0.attention", "1.attention"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="alpha 4 skips 6 sublayers, but the model has 4 of atten"):
        LLMDrop().plan(profile(4), 4)
    with pytest.raises(ValueError, match="which must be 'attention' or 'joint', got 'ffn'"):
        LLMDrop("ffn")  # type: ignore[arg-type]
    message = "alpha 2.0 skips 2 of 4 layers, but UnifiedSkip may skip 1: take a smaller alpha"
    with pytest.raises(ValueError, match=message):
        UnifiedSkip(protected=True).plan(profile(4), 2.0)
    for policy in (UnifiedSkip(), EarlyExit(), ReverseOrder(), LLMDrop()):
        with pytest.raises(ValueError, match="alpha, the acceleration ratio, must be a number"):
            policy.plan(profile(4), 0.5)


@pytest.mark.parametrize("policy", [UnifiedSkip(), EarlyExit(), ReverseOrder(), LLMDrop()])
def test_nothing_is_learned_while_decoding(policy: Policy) -> None:
    assert not isinstance(policy, OnlinePolicy)
    assert policy.plan(profile(4), 1.0) == SkipPlan.empty(profile(4).sublayers)
