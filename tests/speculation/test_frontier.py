"""Which plan drafts within a bound: weaker ones of a plan, and when each is due."""

from __future__ import annotations

import pytest

from adaskip_fx.plans.actions import Action
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.speculation.divergence import Spent
from adaskip_fx.speculation.frontier import Frontier, weaker_plans
from adaskip_fx.speculation.skipped import Skipped

NAMES = [f"{layer}.{kind}" for layer in range(4) for kind in ("attention", "ffn")]
SUBLAYERS = tuple(map(Sublayer.parse, NAMES))
SIMILARITY = dict(zip(SUBLAYERS, (0.5, 0.9, 0.8, 0.7, 0.95, 0.6, 0.99, 0.85), strict=True))


def skipped(plan: SkipPlan) -> set[str]:
    return {str(s) for s in plan.decode}


def test_half_of_what_is_left_out_and_the_least_important() -> None:
    plan = SkipPlan.of(SUBLAYERS, ["0.ffn", "1.attention", "2.attention", "2.ffn", "3.attention"])
    assert [skipped(p) for p in weaker_plans(plan, SIMILARITY)] == [
        {"3.attention", "2.attention"},
        {"3.attention"},
    ]
    assert weaker_plans(SkipPlan.of(SUBLAYERS, ["2.ffn"]), SIMILARITY) == ()


def test_what_else_a_plan_says_stays() -> None:
    skip = [s for s in SUBLAYERS if str(s) in ("0.ffn", "3.ffn")]
    windows = Windows.of(["1.attention"], Window(8))
    factors = Surrogates.scale({s: 1.5 for s in skip})
    plan = SkipPlan.of(SUBLAYERS, skip, surrogates=factors, windows=windows)
    first, last = weaker_plans(plan, SIMILARITY)
    assert skipped(first) == {"0.ffn"}
    assert skipped(last) == set()
    assert first.windows == last.windows == windows
    assert first.surrogates == factors
    assert last < first < plan
    only_decode = SkipPlan(SUBLAYERS, {}, {s: Action.SKIP for s in skip})
    (one,) = weaker_plans(only_decode, SIMILARITY)
    assert skipped(one) == {"0.ffn"}
    assert not one.prefill


def test_weaker_plans_that_are_not() -> None:
    strong, weak, other = (
        SkipPlan.of(SUBLAYERS, names) for names in (["0.ffn", "1.ffn"], ["0.ffn"], ["2.ffn"])
    )
    assert Skipped(strong, [weak]).weaker == (weak,)  # type: ignore[arg-type]
    for plan, weaker in ((strong, (other,)), (weak, (strong,)), (strong, (weak, weak))):
        with pytest.raises(ValueError, match="must leave out less than the one before it"):
            Skipped(plan, weaker)
    assert Skipped(strong, ()).weaker == ()


def frontier() -> Frontier:
    plans = [SkipPlan.of(SUBLAYERS, NAMES[:count]) for count in (4, 2, 1)]
    return Frontier(plans, 0.1)


def test_a_plan_within_the_bound_stays() -> None:
    due = frontier()
    for _ in range(20):
        assert not due.verified(Spent(0.9, 10, False, 0.05), 11)
        assert not due.verified(Spent(0.5, 10, True, 0.0), 11), "one dear token is none too many"
    assert due.plan is due.plans[0]


def test_a_plan_beyond_it_is_weakened_step_by_step_as_far_as_there_is_one() -> None:
    due = frontier()
    levels = list[int]()
    for _ in range(4):
        due.verified(Spent(5.0, 10, True, 0.2), 3)
        levels.append(due.level)
    assert levels == [1, 2, 2, 2]
    assert due.weakened == 2


def test_what_is_left_is_looked_at_before_it_is_gone() -> None:
    """A plan of 0.2 nats with 100 nats left stays; with 3 it does not: 32 tokens cost 3.2 more."""
    for left, level in ((100.0, 0), (3.0, 1)):
        due = frontier()
        for _ in range(30):
            due.verified(Spent(2.0, 10, False, 100.0), 11)
        due.verified(Spent(2.0, 10, False, left), 11)
        assert due.level == level


def test_a_stronger_one_comes_back_when_there_is_enough_for_it() -> None:
    due = frontier()
    due.verified(Spent(8.0, 2, True, 0.0), 3)
    assert due.level == 1
    rate = (8 + 0.8 * 0.8) / (2 + 0.8 * 8)  # with what was supposed of it
    enough = 32 * (rate - 0.1)
    assert not due.verified(Spent(0.1, 10, False, 100.0), 11), "not at once"
    assert not due.verified(Spent(0.1, 10, False, enough - 0.01), 30)
    assert due.verified(Spent(0.1, 10, False, enough + 0.01), 11)
    assert due.level == 0
