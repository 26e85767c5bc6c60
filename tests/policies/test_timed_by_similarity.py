"""What is skipped and what sees a window, by a profile and times: beside every plan of a toy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adaskip_fx
from adaskip_fx.latency.table import LatencyTable
from adaskip_fx.latency.terms import Costs, TableError
from adaskip_fx.plans.skip_plan import Action, Phase, SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies import TimedBySimilarity
from adaskip_fx.profiles.fingerprint import Fingerprint
from adaskip_fx.profiles.head_windows import HeadWindows
from tests.support.profiles import profile

PHASES: tuple[Phase, ...] = ("prefill", "decode")
SKIP = Action.SKIP
WIDE, NARROW = Window(50, 4), Window(6, 2)
NAMES = tuple(Sublayer(n, kind) for n in range(2) for kind in ("attention", "ffn"))
ATTENTION = NAMES[::2]
#: Seconds in decode; a prompt takes twice as long where it is not said otherwise.
SECONDS = {
    **{"rest": 1.0, "attention": 10.0, "ffn": 4.0, "scale": 0.5, "attention, heads apart": 1.0},
    **{"attention, window 4+50": 6.0, "attention, window 2+6": 2.0},
}
PROMPTS = {"attention, window 2+6": 10.0}
SIMILAR = {"0.attention": 0.4, "0.ffn": 0.9, "1.attention": 0.7, "1.ffn": 0.8}
CHANGES = [[0.01, 0.04], [0.02, 0.2], [0.03, 0.05], [0.01, 0.3]]  # by head; wide, then narrow


def table(windows: bool = True, prompts: dict[str, float] = PROMPTS, **about: Any) -> LatencyTable:
    prompts = {name: 2 * s for name, s in SECONDS.items()} | prompts
    phases: tuple[tuple[Phase, dict[str, float]], ...] = (("prefill", prompts), ("decode", SECONDS))
    costs = tuple(Costs(phase, 100, seconds) for phase, seconds in phases)
    heads = tuple(2 if s in ATTENTION else 0 for s in NAMES) if windows else ()
    model = Fingerprint("a" * 16, "llama", 1, "b" * 16)
    return LatencyTable(model, about, NAMES, tuple(s.kind for s in NAMES), costs, heads)


def measured(
    similar: dict[str, float] = SIMILAR, changes: list[list[float]] = CHANGES
) -> adaskip_fx.Profile:
    sums = [[[4 * change, 4 * change**1.5, 4] for change in pair] for pair in changes]
    heads = HeadWindows((WIDE, NARROW), dict.fromkeys(ATTENTION, 2), np.array([sums]))
    return dataclasses.replace(profile(2, similar), windows=heads)


def seconds(plan: SkipPlan, phase: Phase) -> float:
    """By hand; a scale for each that is skipped, as if none lay side by side."""
    every = SECONDS if phase == "decode" else {n: 2 * s for n, s in SECONDS.items()} | PROMPTS
    total = every["rest"]
    for sublayer in NAMES:
        window = plan.windows.of_phase(phase).get(sublayer)
        if plan.action(phase, sublayer) is Action.SKIP:
            total += every["scale"]
        elif window is None:
            total += every[sublayer.kind]
        else:
            narrow = every[f"attention, window {window.sinks}+{window.tokens}"]
            apart = every["attention, heads apart"] + (every["attention"] - narrow) / 2
            total += narrow + (apart if window.full_heads else 0)
    return total


def change(plan: SkipPlan, similar: dict[str, float], changes: list[list[float]]) -> float:
    """By hand, half of it in each phase."""
    total = 0.0
    for phase in PHASES:
        total += sum(1 - similar[str(s)] for s in plan.skipped(phase)) / 2
        for sublayer, window in plan.windows.of_phase(phase).items():
            which = (WIDE.tokens, NARROW.tokens).index(window.tokens)
            heads = [h for h in range(2) if h not in window.full_heads]
            total += sum(changes[2 * sublayer.layer + h][which] for h in heads) / 2
    return total


def every_plan() -> Iterator[SkipPlan]:
    """Every plan that leaves a part of the model out in one phase, or alike in both."""
    windows = [
        Window(w.tokens, w.sinks, full)
        for w in (WIDE, NARROW)
        for count in range(2)
        for full in combinations(range(2), count)
    ]
    ways = [PHASES, *((phase,) for phase in PHASES)]
    narrow = [None, (SKIP, PHASES), *product(windows, ways)]
    options = [narrow if s in ATTENTION else [None, *product([SKIP], ways[::2])] for s in NAMES]
    for chosen in product(*options):
        found = {s: option for s, option in zip(NAMES, chosen, strict=True) if option}
        skip = {s: phases for s, (what, phases) in found.items() if what is SKIP}
        seen = {
            phase: {s: w for s, (w, phases) in found.items() if w is not SKIP and phase in phases}
            for phase in PHASES
        }
        if len(skip) < len(NAMES):
            yield SkipPlan.of(
                NAMES,
                [s for s, phases in skip.items() if phases == PHASES],
                decode_extra=[s for s, phases in skip.items() if phases != PHASES],
                windows=Windows(**seen),
            )


EVERY = list(every_plan())
FULL = EVERY[0]


def speed_up(plan: SkipPlan, phase: Phase) -> float:
    return seconds(FULL, phase) / seconds(plan, phase)


FASTER = {phase: np.array([speed_up(plan, phase) for plan in EVERY]) for phase in PHASES}
#: Of each sublayer, in which plans it runs.
RUNS = {s: np.array([s not in plan.skipped("decode") for plan in EVERY]) for s in NAMES}


NONE, ALL = [[0.0, 0.0]] * 4, dict.fromkeys(SIMILAR, 1.0)
#: What each plan changes, as a sum: how often the change of each sublayer and of each head counts.
COUNTS = np.array(
    [
        [
            *(change(p, dict(zip(SIMILAR, 1 - np.eye(4)[n], strict=True)), NONE) for n in range(4)),
            *(change(p, ALL, np.eye(8)[n].reshape(4, 2).tolist()) for n in range(8)),
        ]
        for p in EVERY
    ]
)


def test_windows_and_skipping_take_turns() -> None:
    """Wide windows lose 0.05 and 0.04 for 4 s, the first ffn 0.1 for 3.5 s."""
    policy = TimedBySimilarity(table(), 100, "decode")
    plan = policy.plan(measured(), 1.15)
    assert dict(plan.windows.decode) == {ATTENTION[0]: WIDE}
    assert not plan.decode
    assert not plan.windows.prefill, "prompts need not be faster"
    plan = policy.plan(measured(), 1.5)
    assert dict(plan.windows.decode) == {ATTENTION[0]: WIDE, ATTENTION[1]: WIDE}
    assert plan.skipped("decode") == (NAMES[1],)
    assert not plan.skipped("prefill")
    assert plan.surrogates.factors == {NAMES[1]: 0.75}, "AdaSkip's scale of the profile"
    assert policy.plan(measured(), 1.0) == FULL


SHARES = st.lists(st.floats(0, 1), min_size=4, max_size=4)
PAIRS = st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)).map(list), min_size=4, max_size=4)


@given(SHARES, PAIRS, st.floats(1, 4), st.sampled_from(["prefill", "decode"]))
def test_beside_every_plan(
    shares: list[float], changes: list[list[float]], alpha: float, phase: Phase
) -> None:
    """It reaches alpha where a plan does, and changes little more than the best of them."""
    similar = dict(zip(map(str, NAMES), shares, strict=True))
    most = max(NAMES, key=lambda s: (1 - similar[str(s)], -NAMES.index(s)))
    enough = (FASTER[phase] >= alpha) & RUNS[most]
    policy = TimedBySimilarity(table(), 100, phase)
    if not enough.any():
        with pytest.raises(ValueError, match="cannot be met at 100 tokens: the best possible is"):
            policy.plan(measured(similar, changes), alpha)
        return
    plan = policy.plan(measured(similar, changes), alpha)
    assert speed_up(plan, phase) >= alpha * (1 - 1e-9)
    sums = COUNTS @ [*(1 - share for share in shares), *np.ravel(changes)]
    best = float(sums[enough].min())
    dearest = max([1 - share for share in shares] + [sum(c) for c in changes])
    assert best - 1e-9 <= change(plan, similar, changes) <= best + 2 * dearest


@given(SHARES, PAIRS, st.floats(1, 2))
def test_each_phase_is_faster(
    shares: list[float], changes: list[list[float]], alpha: float
) -> None:
    similar = dict(zip(map(str, NAMES), shares, strict=True))
    plan = TimedBySimilarity(table(), 100).plan(measured(similar, changes), alpha)
    assert min(speed_up(plan, "prefill"), speed_up(plan, "decode")) >= alpha * (1 - 1e-9)


def test_phases_are_chosen_apart() -> None:
    """Where windows save nothing of a prompt, decoding alone has them beside an FFN of both."""
    slow = {f"attention, window {w.sinks}+{w.tokens}": 20.0 for w in (WIDE, NARROW)} | {"ffn": 16}
    plan = TimedBySimilarity(table(prompts=slow), 100).plan(measured(), 1.2)
    assert not plan.windows.prefill
    assert {w.tokens for w in plan.windows.decode.values()} == {WIDE.tokens}
    assert plan.skipped("prefill") == plan.skipped("decode") == (NAMES[1],)
    usual = TimedBySimilarity(table(), 100).plan(measured(), 1.2)
    assert usual.windows.prefill == usual.windows.decode


def test_a_request_of_both_phases() -> None:
    weights: dict[Phase, float] = {"prefill": 1, "decode": 3}
    plan = TimedBySimilarity(table(), 100, weights).plan(measured(), 1.5)
    took = [sum(n * seconds(p, phase) for phase, n in weights.items()) for p in (FULL, plan)]
    assert took[0] / took[1] >= 1.5


def test_what_it_says_of_a_plan() -> None:
    policy = TimedBySimilarity(table(), 100)
    first = Window(50, 4, (0,))
    windows = Windows.of({ATTENTION[0]: WIDE, ATTENTION[1]: first})
    plan = SkipPlan.of(NAMES, [NAMES[1]], windows=windows)
    assert policy.describe(plan, measured()).splitlines() == [
        "predicted at 100 tokens: prefill 1.45x, decode 1.45x (measured)",
        "1 of 4 sublayers skipped, windows in 3 of 4 K/V heads (whole layers: 1)",
        "change of the stream: 0.1 by skipping and 0.04 by windows (sums of 1 - cosine)",
    ]
    other = plan.with_windows(Windows.of({ATTENTION[0]: NARROW}))
    alone = dataclasses.replace(measured(), windows=None)
    said = policy.describe(other, alone).splitlines()
    assert said[2:] == ["the profile has no windows: calibrate(windows=[...]) would offer them"]
    counted = TimedBySimilarity(table(times="counted, not measured"), 100)
    assert counted.describe(FULL).splitlines() == [
        "predicted at 100 tokens: prefill 1x, decode 1x (counted, not measured)",
        "0 of 4 sublayers skipped, no windows",
    ]


def test_only_windows_of_both_the_profile_and_the_table() -> None:
    bare = TimedBySimilarity(table(windows=False), 100)
    assert not bare.plan(measured(), 1.3).windows
    assert bare.describe(FULL, measured()).endswith(
        "the table has no times of window 4+50, window 2+6: measure one with such windows "
        "(adaskip-fx measure --window)"
    )
    without = dataclasses.replace(measured(), windows=None)
    assert not TimedBySimilarity(table(), 100).plan(without, 1.3).windows


def test_what_it_refuses() -> None:
    policy = TimedBySimilarity(table(), 100)
    without = dataclasses.replace(measured(), windows=None)
    with pytest.raises(ValueError, match="alpha, the speed-up, must be at least 1, got nan"):
        policy.plan(measured(), float("nan"))
    with pytest.raises(
        ValueError,
        match=r"alpha 9 cannot be met at 100 tokens: the best possible is 2.32x \(prefill\); "
        r"take a smaller alpha. Besides, the profile has no windows: calibrate",
    ):
        policy.plan(without, 9)
    with pytest.raises(TableError, match="measured were 100"):
        TimedBySimilarity(table(), 200).plan(measured(), 1.2)
    with pytest.raises(ValueError, match="phase must be"):
        TimedBySimilarity(table(), 100, {"prefill": -1})
