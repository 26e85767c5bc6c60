"""SkipDecode and D3: their schedules against lists by hand, and what every schedule keeps to."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.skip_plan import Action
from adaskip_fx.policies import D3, SkipDecode
from adaskip_fx.policies.depth_schedules import DepthSchedule, in_levels
from tests.support.profiles import profile


def layers_by_step(schedule: Schedule) -> list[tuple[int, list[int]]]:
    """First steps and the layers gone from there; each is gone whole, its K/V is written."""
    found = []
    for first, plan in schedule.steps:
        assert not plan.prefill
        for sublayer, action in plan.decode.items():
            assert action is (Action.SKIP if sublayer.kind == "ffn" else Action.KV_ONLY)
        layers = sorted({s.layer for s in plan.decode})
        assert len(plan.decode) == 2 * len(layers)
        found.append((first, layers))
    return found


def test_skip_decode_by_hand() -> None:
    """8 of 12 layers in the mean over 4 tokens: 12 - 8/3 i = 12, 9.3, 6.7, 4 of them."""
    found = layers_by_step(SkipDecode(length=4).plan(profile(12), 1.5))
    assert found == [
        (0, []),
        (1, [1, 2, 3]),
        (2, [1, 2, 3, 4, 5]),
        (3, [1, 2, 3, 4, 5, 6, 7, 8]),
    ]
    kept = layers_by_step(SkipDecode(length=4, warm_up=3).plan(profile(12), 1.5))
    assert kept[1] == (1, [3, 4, 5])
    two = layers_by_step(SkipDecode(length=4, levels=2).plan(profile(12), 1.5))
    assert two == [(0, [1]), (2, [1, 2, 3, 4, 5, 6])], "10.5 and 5.5, rounded up"


def test_skip_decode_begins_lower_where_the_mean_needs_it() -> None:
    """4 of 8 in the mean, 3 at least (layers 0, 1, 7): from 5 down to 3."""
    found = layers_by_step(SkipDecode(length=3, protected=True).plan(profile(8), 2.0))
    assert found == [(0, [2, 3, 4]), (1, [2, 3, 4, 5]), (2, [2, 3, 4, 5, 6])]


def test_d3_by_hand() -> None:
    """floor(10 * 0.8^i) = 10, 8, 6, 5, 4, 4 (layers 0, 1, 8, 9 at least)."""
    found = layers_by_step(D3(length=6, levels=6, decay=0.8).plan(profile(10), 1.0))
    assert found == [
        (0, []),
        (1, [4, 5]),
        (2, [3, 4, 5, 6]),
        (3, [2, 3, 4, 5, 6]),
        (4, [2, 3, 4, 5, 6, 7]),
    ]


@pytest.mark.parametrize("policy", [SkipDecode, D3])
@given(
    st.integers(6, 40),
    st.floats(1.0, 1.5),
    st.integers(8, 300),
    st.integers(1, 6),
    st.booleans(),
)
def test_what_every_schedule_keeps_to(
    policy: type[DepthSchedule], layers: int, alpha: float, length: int, levels: int, p: bool
) -> None:
    schedule = policy(length=length, levels=levels, protected=p).plan(profile(layers), alpha)
    assert len(schedule.steps) <= levels
    found = layers_by_step(schedule)
    assert all(set(a) < set(b) for (_, a), (_, b) in pairwise(found)), "what is gone stays gone"
    assert all(0 not in gone and layers - 1 not in gone for _, gone in found)
    assert not p or all(1 not in gone for _, gone in found)
    firsts = [first for first, _ in found]
    spans = [b - a for a, b in pairwise([*firsts, length])]
    run = sum(n * (layers - len(gone)) for n, (_, gone) in zip(spans, found, strict=True))
    assert run / length == pytest.approx(layers / alpha, abs=1.6)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 8))
def test_in_levels(depths: list[int], levels: int) -> None:
    depths.sort(reverse=True)
    pairs = in_levels(depths, levels)
    assert pairs[0][0] == 0
    assert len(pairs) <= levels
    assert all(a < b and m > n for (a, m), (b, n) in pairwise(pairs))
    ends = [*(first for first, _ in pairs), len(depths)]
    spans = [b - a for a, b in pairwise(ends)]
    total = sum(n * depth for n, (_, depth) in zip(spans, pairs, strict=True))
    assert abs(total - sum(depths)) <= len(depths) / 2
    assert in_levels(depths, len(depths))[0] == (0, depths[0])


def test_compensation_is_an_option() -> None:
    plain, scaled = (
        SkipDecode(length=4, scaled=c).plan(profile(12), 1.5).plans[-1] for c in (False, True)
    )
    assert plain.decode == scaled.decode
    assert not plain.surrogates.factors
    assert set(scaled.surrogates.factors.values()) == {0.75}


def test_refusals() -> None:
    message = "SkipDecode cannot run 1.0 of 4 layers in the mean, with 2 at least: take a smaller"
    with pytest.raises(ValueError, match=message):
        SkipDecode().plan(profile(4), 4.0)
    with pytest.raises(ValueError, match=r"D3 cannot run 3\.0 of 6 layers in the mean, with 4"):
        D3().plan(profile(6), 2.0)
    with pytest.raises(ValueError, match="SkipDecode: length must be at least 1, got 0"):
        SkipDecode(length=0)
    with pytest.raises(ValueError, match="D3: levels must be at least 1, got 0"):
        D3(levels=0)
    with pytest.raises(ValueError, match=r"D3: decay must be above 0 and at most 1, got 1\.5"):
        D3(decay=1.5)
    for policy in (SkipDecode(), D3()):
        for alpha in (0.5, float("nan"), float("inf"), True):
            with pytest.raises(ValueError, match="alpha, the acceleration ratio, must be a number"):
                policy.plan(profile(4), alpha)


@pytest.mark.parametrize("policy", [SkipDecode(), D3()])
def test_nothing_is_skipped_at_one(policy: DepthSchedule) -> None:
    assert layers_by_step(policy.plan(profile(8), 1.0)) == [(0, [])]
