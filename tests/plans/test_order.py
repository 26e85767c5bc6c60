"""The order of plans and their union: windows, examples worked out by hand, texts of errors."""

from __future__ import annotations

import operator
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from adaskip_fx.plans.phase_split import decode_only, prefill_only
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.tables import TIMES
from adaskip_fx.plans.windows import Window, Windows
from tests.support.plan_sets import SKIP, SUBLAYERS, WINDOWS, seen

PROPERTY = settings(max_examples=max(100, settings.default.max_examples))  # they are quick
EMPTY = SkipPlan.empty(SUBLAYERS)


def sub(text: str) -> Sublayer:
    return Sublayer.parse(text)


def skip(*names: str, **scales: float) -> SkipPlan:
    """skip("0.ffn", ffn1=0.9) skips 0.ffn in both phases and has a scale for 1.ffn."""
    factors = {Sublayer(int(n.removeprefix("ffn")), "ffn"): f for n, f in scales.items()}
    return SkipPlan.of(SUBLAYERS, names, surrogates=Surrogates.scale(factors))


def windowed(*windows: Window) -> SkipPlan:
    """Attention of layers 0, 1, ... sees these windows in both phases."""
    names = sub("0.attention"), sub("1.attention")
    return EMPTY.with_windows(Windows.of(dict(zip(names, windows, strict=False))))


# Windows -----------------------------------------------------------------------------------------


@PROPERTY
@given(WINDOWS, WINDOWS)
def test_a_window_within_another(one: Window, other: Window) -> None:
    assert one.sees_within(other) == (seen(one) <= seen(other))


@PROPERTY
@given(WINDOWS, WINDOWS, WINDOWS)
def test_joined_windows(one: Window, other: Window, third: Window) -> None:
    joined = one.joined(other)
    both = seen(one) & seen(other)
    assert seen(joined) <= both
    assert not seen(third) <= both or seen(third) <= seen(joined)


def test_windows_by_hand() -> None:
    assert Window(256, 4).joined(Window(64, 16)) == Window(64, 4)
    assert Window(8, 3, (2, 0)).joined(Window(8, 3, (0, 1))) == Window(8, 3, (0,))
    assert Window(8, 3).sees_within(Window(8, 3, (0,)))
    assert not Window(3, 8).sees_within(Window(8, 3))
    assert not Window(8, 3).sees_within(Window(3, 8))


# By hand -----------------------------------------------------------------------------------------


def test_a_union_by_hand() -> None:
    narrow = windowed(Window(256, 4, (0, 1)), Window(64))
    other = windowed(Window(64, 16, (1,)))
    more = skip("1.attention", "0.ffn", ffn0=0.9, ffn1=0.8)
    union = narrow | other | more
    assert union.prefill == union.decode == {sub("0.ffn"): SKIP, sub("1.attention"): SKIP}
    assert union.windows == Windows.of({sub("0.attention"): Window(64, 4, (1,))})
    assert union.surrogates == more.surrogates
    assert narrow < union > more
    assert not narrow <= more
    assert not more <= narrow
    apart = prefill_only(more, last_token_full=False) | decode_only(more)
    assert apart == prefill_only(more, more, last_token_full=False)
    assert apart < more == apart | more


def test_surrogates() -> None:
    bare, scaled, idle = skip("0.ffn"), skip("0.ffn", ffn0=0.9), skip(ffn0=0.8)
    assert not bare <= scaled
    assert not scaled <= bare
    assert idle < bare
    assert idle < scaled
    assert idle > EMPTY
    assert not idle <= skip(ffn0=0.7)
    assert idle | scaled == scaled
    assert idle | skip("1.ffn") == skip("1.ffn", ffn0=0.8)
    assert scaled | skip("1.ffn", ffn0=0.8) == skip("0.ffn", "1.ffn", ffn0=0.9)


def test_the_last_token_of_a_prompt() -> None:
    """It is compared as what it runs as: like decode, or like the rest of the prompt."""
    skipping = skip("1.ffn", "1.attention")
    full, without = (prefill_only(skipping, last_token_full=b) for b in (True, False))
    assert full < without < skipping
    assert full | without == without
    narrow = windowed(Window(64))
    assert (full | narrow).last_token_full, "the phases of the other are alike"
    assert not (without | narrow).last_token_full
    alike = replace(skipping, last_token_full=True)
    assert skipping < alike, "they mean the same, and have an order all the same"
    assert skipping | alike == alike
    assert (alike | narrow) == skipping | narrow, "its phases are alike, so it says nothing"


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            skip("0.ffn", ffn0=0.9),
            skip("0.ffn", "1.ffn"),
            f"0.ffn: the two plans have different surrogates for it, {TIMES}0.900 and none; "
            "give both the same one (with_surrogates)",
        ),
        (
            skip(ffn1=0.5),
            skip("0.ffn", ffn1=2.0),
            f"1.ffn: the two plans have different surrogates for it, {TIMES}0.500 and "
            f"{TIMES}2.000; give both the same one (with_surrogates)",
        ),
        (
            prefill_only(skip("1.ffn")),
            prefill_only(skip("2.ffn"), last_token_full=False),
            "only one of the two plans has last_token_full, and the last token of a prompt would "
            "be like neither prefill nor decode of their union; set it in both or in none",
        ),
        (
            skip("0.attention", "1.attention", "2.mixer"),
            skip("0.ffn", "1.ffn", "2.ffn"),
            "nothing runs in prefill: all 6 sublayers from 0.attention to 2.ffn are skipped; at "
            "least one must run",
        ),
        (
            EMPTY,
            SkipPlan.empty(SUBLAYERS[:2]),
            "the two plans are for different models: their sublayers differ",
        ),
    ],
    ids=["surrogates", "surrogates of what runs", "last token", "nothing runs", "models"],
)
def test_what_has_no_union(one: SkipPlan, other: SkipPlan, message: str) -> None:
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        one | other
    with pytest.raises(PlanError):
        other | one


def test_what_cannot_be_compared() -> None:
    one: Any = EMPTY
    for compare in (operator.le, operator.lt, operator.ge, operator.gt):
        with pytest.raises(PlanError, match="for different models: their sublayers differ"):
            compare(one, SkipPlan.empty(SUBLAYERS[::-1]))
        with pytest.raises(TypeError, match="not supported between instances of 'SkipPlan'"):
            compare(one, 3)
    with pytest.raises(TypeError, match="unsupported operand"):
        one | {}
    assert one != SkipPlan.empty(SUBLAYERS[::-1])
    assert len({one, SkipPlan.empty(SUBLAYERS)}) == 1
