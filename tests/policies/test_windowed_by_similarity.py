"""Windows by what a profile says of heads: planted changes, chosen in their order by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adaskip_fx
from adaskip_fx.latency.table import LatencyTable
from adaskip_fx.latency.terms import Costs, TableError
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window
from adaskip_fx.policies import WindowedBySimilarity
from adaskip_fx.profiles.fingerprint import Fingerprint
from adaskip_fx.profiles.head_windows import HeadWindows
from adaskip_fx.profiles.profile import ProfileError
from tests.support.compiled_llamas import make_model
from tests.support.profiles import profile
from tests.support.tokenizers import Letters

NARROW, WIDE = Window(6, 2), Window(10, 2)
ATTENTION = [Sublayer(n, "attention") for n in range(3)]
PLACES = [(layer, head) for layer in range(3) for head in range(2)]
CHANGES = [0.3, 0.1, 0.9, 0.2, 0.5, 0.4]


def measured(
    changes: list[float] = CHANGES,
    windows: tuple[Window, ...] = (NARROW,),
    wide: list[float] = CHANGES[::-1],
) -> adaskip_fx.Profile:
    """Each head changes all of four tokens alike; through a second window as `wide` says."""
    sums = [
        [[4 * change, 4 * change**1.5, 4] for change in pair[: len(windows)]]
        for pair in zip(changes, wide, strict=True)
    ]
    heads = HeadWindows(windows, dict.fromkeys(ATTENTION, 2), np.array([sums]))
    return dataclasses.replace(profile(3), windows=heads)


def windowed_heads(plan: SkipPlan, tokens: int = 6) -> list[tuple[int, int]]:
    """(layer, head) of those that have a window; both phases have the same."""
    assert plan.windows.prefill == plan.windows.decode
    assert not plan.decode
    found = []
    for sublayer, window in plan.windows.decode.items():
        assert (window.tokens, window.sinks) == (tokens, 2)
        found += [(sublayer.layer, h) for h in range(2) if h not in window.full_heads]
    return found


def test_heads_that_change_the_stream_least_come_first() -> None:
    """Six heads read 16 tokens each, one with a window 8: alpha 96 / (96 - 8 n)."""
    plans = WindowedBySimilarity(context=16).plans(measured(), 2)
    chosen = [set(windowed_heads(plan)) for plan in plans]
    order = [(0, 1), (1, 1), (0, 0), (2, 1), (2, 0), (1, 0)]
    assert chosen == [set(order[:n]) for n in range(7)]
    assert WindowedBySimilarity(context=16).plan(measured(), 1.2) == plans[2]


@given(st.permutations(CHANGES), st.floats(1, 2))
def test_it_is_the_least_number_that_is_enough(changes: list[float], alpha: float) -> None:
    heads = windowed_heads(WindowedBySimilarity(context=16).plan(measured(changes), alpha))
    least = next(n for n in range(7) if 96 / (96 - 8 * n) >= alpha)
    planted = sorted(zip(changes, PLACES, strict=True))
    assert sorted(heads) == sorted(place for _, place in planted[:least])


def test_layers_by_the_sum_of_their_heads() -> None:
    """0.4, 1.1 and 0.9; a layer saves 16 of 96 tokens."""
    plans = WindowedBySimilarity(context=16, per="layer").plans(measured(), 2)
    assert [sorted({layer for layer, _ in windowed_heads(plan)}) for plan in plans] == [
        *([], [0], [0, 2], [0, 1, 2]),
    ]


def test_one_of_several_windows() -> None:
    """Through the wider one the heads come the other way round."""
    both = measured(windows=(NARROW, WIDE))
    narrow, wide = (WindowedBySimilarity(w, context=16) for w in (NARROW, WIDE))
    assert windowed_heads(narrow.plans(both, 1.05)[1]) == [(0, 1)]
    assert windowed_heads(wide.plans(both, 1.03)[1], tokens=10) == [(2, 0)]


@pytest.mark.parametrize(("factor", "tokens"), [(1.1, 6), (0.9, 10)])
def test_the_window_whose_plan_changes_least(factor: float, tokens: int) -> None:
    """One head is enough for 1.04 through either window; for 1.5 only the narrow one is."""
    both = measured(windows=(WIDE, NARROW), wide=CHANGES, changes=[factor * c for c in CHANGES])
    policy = WindowedBySimilarity(context=16)
    assert windowed_heads(policy.plan(both, 1.04), tokens) == [(0, 1)]
    assert len(windowed_heads(policy.plan(both, 1.5))) == 4
    with pytest.raises(ValueError, match=r"alpha must be from 1 to 2, which is what a window 2\+6"):
        policy.plan(both, 2.1)


def test_compiled_with_it() -> None:
    model = make_model("grouped")
    windows = [Window(12, 4), Window(30, 0)]
    letters = "A decoder adds to its residual stream, twice a layer."
    found = adaskip_fx.calibrate(model, Letters(), [letters], windows=windows, max_length=96)
    policy = WindowedBySimilarity(context=400)
    fast = adaskip_fx.compile(model, found, 1.3, policy=policy, backend="eager")
    assert fast.adaskip.plan == policy.plan(found, 1.3)
    assert fast.adaskip.plan.windows
    plain = dataclasses.replace(found, windows=None)
    with pytest.raises(ProfileError, match="this profile was measured without windows"):
        adaskip_fx.compile(model, plain, policy=policy, backend="eager")


def test_alpha_may_count_time() -> None:
    """43 seconds are 35 with a window in one layer, 27 in two: 1.23 and 1.59 times as fast."""
    names = measured().sublayers
    seconds = {
        **{"rest": 1.0, "attention": 10.0, "ffn": 4.0, "scale": 0.0},
        **{"attention, window 2+6": 2.0, "attention, heads apart": 0.0},
    }
    costs = tuple(Costs(phase, 100, seconds) for phase in ("prefill", "decode"))
    about = Fingerprint("a" * 16, "llama", 1, "b" * 16)
    heads = tuple(2 if s.kind == "attention" else 0 for s in names)
    table = LatencyTable(about, {}, names, tuple(s.kind for s in names), costs, heads)
    policy = WindowedBySimilarity(NARROW, context=100, per="layer", table=table)
    for alpha, layers in ((1.2, [0]), (1.3, [0, 2])):
        plan = policy.plan(measured(), alpha)
        assert [s.layer for s in plan.windows.decode] == layers
    with pytest.raises(TableError, match="the table is of the model"):
        policy.check(make_model("one_layer"))


@pytest.mark.parametrize(
    ("policy", "subject", "message"),
    [
        (
            WindowedBySimilarity(),
            profile(3),
            r"this profile was measured without windows: calibrate again with windows=\[...\] "
            r"\(adaskip-fx calibrate --windows 256\)",
        ),
        (
            WindowedBySimilarity(Window(7, 2)),
            measured(windows=(NARROW, WIDE)),
            r"a window 2\+7 was not measured in this profile: there is window 2\+6, window 2\+10. "
            "Take one of these, or calibrate again with it",
        ),
    ],
)
def test_profiles_that_do_not_say(
    policy: WindowedBySimilarity, subject: adaskip_fx.Profile, message: str
) -> None:
    with pytest.raises(ProfileError, match=message):
        policy.plan(subject, 1.2)


@pytest.mark.parametrize(
    ("options", "alpha", "message"),
    [
        ({"context": 16}, 2.1, r"alpha must be from 1 to 2, which is what a window 2\+6 in all"),
        ({"context": 16}, 0.9, "alpha must be from 1 to 2"),
        ({"context": 8}, 1.1, r"a window 2\+6 sees all of 8 tokens; take a longer context"),
    ],
)
def test_alphas_that_windows_do_not_give(
    options: dict[str, Any], alpha: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WindowedBySimilarity(**options).plan(measured(), alpha)


def test_units_that_are_not_known() -> None:
    with pytest.raises(ValueError, match="per is 'head' or 'layer', got 'token'"):
        WindowedBySimilarity(per="token")  # type: ignore[arg-type]
