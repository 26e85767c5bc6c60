"""The order of plans and their union, against sets of what is computed and all plans of a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adaskip_fx.plans import order
from adaskip_fx.plans.phase_split import decode_only, prefill_only
from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.windows import NO_WINDOWS, Window
from tests.support.plan_sets import (
    SUBLAYERS,
    computed,
    computed_by,
    every_choice,
    plan_of,
    several,
    some_run,
    united,
)

PROPERTY = settings(max_examples=max(100, settings.default.max_examples))  # they are quick
EMPTY = SkipPlan.empty(SUBLAYERS)


# Every plan of a small model ---------------------------------------------------------------------


def check_against_every_plan() -> int:
    """Compare the order and unions with those of the sets; return how many have no union."""
    choices, elements = every_choice(), dict[Any, int]()
    sets = [computed(*choice) for choice in choices]
    bits = [sum(1 << elements.setdefault(e, len(elements)) for e in found) for found in sets]
    numbers = range(len(choices))

    def below(i: int, j: int) -> bool:
        if bits[i] == bits[j]:  # the same but for last_token_full, which says nothing there
            return choices[i][1] <= choices[j][1]
        return not bits[j] & ~bits[i]

    above = [sum(1 << j for j in numbers if below(i, j)) for i in numbers]
    plans = {i: plan_of(*choice) for i, choice in enumerate(choices) if some_run(choice[0])}
    none = 0
    for i, j in itertools.product(plans, plans):
        assert (plans[i] <= plans[j]) == bool(above[i] >> j & 1), f"{plans[i]}\n{plans[j]}"
        upper, union = above[i] & above[j], united(plans[i], plans[j])
        least = [k for k in numbers if upper >> k & 1 and not upper & ~above[k]]
        assert union == (plans.get(least[0]) if least else None), f"{plans[i]}\n{plans[j]}"
        none += union is None
    return none


def test_every_plan_of_a_small_model() -> None:
    none = check_against_every_plan()
    assert 0 < none < 164**2 / 2, "most unions are there to be compared"


@pytest.mark.breaks
@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (Window, "joined", lambda one, two: replace(one, tokens=max(one.tokens, two.tokens))),
        (Window, "joined", lambda one, two: Window(1, 0)),
        (Window, "sees_within", lambda one, two: one.sinks <= two.sinks),
        (order, "_rank", lambda reduction: int(isinstance(reduction, Action))),
        (order, "_last_token_full", lambda prefill, decode, last: True),
    ],
    ids=["more tokens", "one token", "sinks alone", "kv_only as skip", "the last token"],
)
def test_a_wrong_one_shows(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Callable[..., Any]
) -> None:
    """The companion."""
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        check_against_every_plan()


# Laws --------------------------------------------------------------------------------------------


@PROPERTY
@given(several(2, plain=True))
def test_below_is_that_no_more_is_computed(plans: Sequence[SkipPlan]) -> None:
    one, other = plans
    assert (one <= other) == (computed_by(other) <= computed_by(one))
    union = united(one, other)
    if union is not None:
        assert computed_by(union) <= computed_by(one) & computed_by(other)


@PROPERTY
@given(several(3))
def test_it_is_an_order(plans: Sequence[SkipPlan]) -> None:
    one, other, third = plans
    assert one <= one
    assert one >= EMPTY
    assert not (one <= other and other <= one) or one == other
    assert not (one <= other and other <= third) or one <= third
    assert not one <= other or computed_by(other) <= computed_by(one)
    assert (one < other) == (one <= other and one != other) == (other > one)
    assert (one >= other) == (other <= one)


@PROPERTY
@given(several(3))
def test_chains(plans: Sequence[SkipPlan]) -> None:
    """Transitivity where it says something: of drawn plans few are below another."""
    one = plans[0]
    above = [p for p in (united(one, plans[1]), united(*plans)) if p is not None]
    assume(len(above) == 2)
    assert one <= above[0] <= above[1]
    assert one <= above[1]
    assert not above[1] < one


@PROPERTY
@given(several(3))
def test_the_union_is_the_least_above_both(plans: Sequence[SkipPlan]) -> None:
    one, other, third = plans
    assert one | one == one
    assert EMPTY | one == one | EMPTY == one
    union = united(one, other)
    assert union == united(other, one)
    assert (one <= other) == (union == other)
    if union is None:
        return
    assert one <= union
    assert other <= union
    assert computed_by(union) <= computed_by(one) & computed_by(other)
    for upper in (third, united(one, other, third), united(third, other, one)):
        above = upper is not None and one <= upper and other <= upper
        assert not above or (upper is not None and union <= upper)


@PROPERTY
@given(several(3))
def test_unions_of_three(plans: Sequence[SkipPlan]) -> None:
    """Associative and monotone, where the unions are there."""
    one, other, third = plans
    left, inner = united(one, other, third), united(other, third)
    right = united(one, inner) if inner is not None else None
    assert left is None or right is None or left == right
    more = united(one, other)
    less, much = united(one, third), united(more, third) if more is not None else None
    assert less is None or much is None or less <= much


@PROPERTY
@given(several(2, plain=True))
def test_plain_plans_have_a_union_unless_nothing_would_run(plans: Sequence[SkipPlan]) -> None:
    one, other = plans
    for phase in ("prefill", "decode"):
        if len({*getattr(one, phase), *getattr(other, phase)}) == len(SUBLAYERS):
            with pytest.raises(PlanError, match=f"^nothing runs in {phase}: all 6"):
                one | other
            return
    assert isinstance(one | other, SkipPlan)


@PROPERTY
@given(several(1), st.sets(st.sampled_from(["0.ffn", "1.ffn"]), min_size=1))
def test_what_leaves_more_out_is_above(plans: Sequence[SkipPlan], names: set[str]) -> None:
    plan = plans[0]
    extra = [s for s in map(Sublayer.parse, names) if s not in {*plan.prefill, *plan.decode}]
    assume(len(plan.decode) + len(extra) < len(SUBLAYERS))
    assert plan <= plan.with_decode_extra(extra, dict.fromkeys(extra, 0.7))
    assert plan.with_windows(NO_WINDOWS) <= plan
    assert decode_only(plan) <= plan
    assert prefill_only(plan, last_token_full=plan.last_token_full) <= plan
    fewer = SkipPlan.of(SUBLAYERS, sorted(names)[1:])
    assert fewer < SkipPlan.of(SUBLAYERS, names)
