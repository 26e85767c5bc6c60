"""What windows cost in a latency table: planted costs come back, and predict other plans."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.latency.table import LatencyTable
from adaskip_fx.latency.terms import TableError
from adaskip_fx.measurement.measure import measure
from adaskip_fx.measurement.window_plans import window_plans
from adaskip_fx.plans.skip_plan import Action, Phase, SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies import Windowed
from tests.support import compiled_llamas
from tests.support.profiles import profile

SHAPE = "three_layers"
BANK = compiled_llamas.entry(SHAPE)
WINDOWS = (Window(16, 4), Window(100, 0))
HEADS = BANK.compiled.adaskip.kv_heads
COUNT = next(iter(HEADS.values()))


def planted(phase: Phase, context: int, plan: SkipPlan) -> float:
    """Seconds, head by head; heads that differ cost 0.125 besides."""
    tokens, total = (context if phase == "prefill" else 1), 3.0
    for sublayer in plan.sublayers:
        if plan.action(phase, sublayer) is not Action.RUN:
            continue
        if sublayer.kind == "ffn":
            total += 0.25 * tokens
            continue
        window = plan.windows.get(phase, sublayer)
        full = range(COUNT) if window is None else window.full_heads
        for head in range(COUNT):
            seen = context if head in full or window is None else window.seen(context)
            total += (1 + seen / 64) * tokens / COUNT
        total += 0.125 if window is not None and window.full_heads else 0.0
    return total


def table(**options: Any) -> LatencyTable:
    return measure(
        BANK.compiled, (64, 256), time_step=planted, windows=WINDOWS, rounds=1, **options
    )


@functools.cache
def costs() -> LatencyTable:
    """The table of all tests."""
    return table()


@given(st.data(), st.sampled_from(["prefill", "decode"]), st.sampled_from([64, 256]))
def test_predicted_as_planted(data: st.DataObject, phase: Phase, context: int) -> None:
    """Any layers, heads, windows and skipped sublayers, at what was measured."""
    narrow, skip = {}, set[str]()
    for sublayer in HEADS:
        what = data.draw(st.sampled_from(["run", "window", "heads", "skip"]))
        window = data.draw(st.sampled_from(WINDOWS))
        if what == "window":
            narrow[sublayer] = window
        elif what == "heads" and COUNT > 1:
            some = data.draw(st.sets(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT - 1))
            narrow[sublayer] = dataclasses.replace(window, full_heads=tuple(some))
        elif what == "skip":
            skip.add(str(sublayer))
    plan = SkipPlan.of(BANK.sublayers, skip, windows=Windows.of(narrow))
    got = costs().seconds(plan, phase, context)
    assert got == pytest.approx(planted(phase, context, plan), rel=1e-6)


def test_a_companion_the_number_of_heads_matters() -> None:
    wrong = dataclasses.replace(costs(), kv_heads=tuple(2 * n for n in costs().kv_heads))
    some = dataclasses.replace(WINDOWS[0], full_heads=(0,))
    plan = SkipPlan.empty(BANK.sublayers).with_windows(Windows.of(list(HEADS), some))
    real = planted("decode", 256, plan)
    assert costs().seconds(plan, "decode", 256) == pytest.approx(real, rel=1e-6)
    assert wrong.seconds(plan, "decode", 256) != pytest.approx(real, rel=1e-2)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    costs().save(path)
    assert LatencyTable.load(path) == costs()
    assert "attention, window 4+16" in str(costs())
    plain = measure(BANK.compiled, (64,), time_step=planted, rounds=1)
    plain.save(path)
    assert "kv_heads" not in path.read_text("utf-8"), "a table without windows is as before"
    assert LatencyTable.load(path) == plain


def test_refusals() -> None:
    attention = list(HEADS)
    empty, window = SkipPlan.empty(BANK.sublayers), Window(17, 4)
    with pytest.raises(TableError, match=r"the cost of 'attention, window 4\+17' was not measured"):
        costs().seconds(empty.with_windows(Windows.of(attention, window)), "decode", 64)
    plain = measure(BANK.compiled, (64,), time_step=planted, rounds=1)
    some = empty.with_windows(Windows.of(attention, Window(16, 4, (0,))))
    with pytest.raises(TableError, match="does not say how many there are; measure again"):
        plain.seconds(some, "decode", 64)
    with pytest.raises(ValueError, match="heads are measured apart; give a window without them"):
        measure(BANK.compiled, (64,), time_step=planted, windows=[Window(9, 0, (1,))])
    classes = ("ffn",) * len(BANK.sublayers)
    with pytest.raises(ValueError, match="no attention whose windows could be measured"):
        window_plans(BANK.sublayers, classes, {}, WINDOWS)
    with pytest.raises(TableError, match="a number of K/V heads for each sublayer, or none"):
        dataclasses.replace(costs(), kv_heads=(1,))


def test_windows_by_predicted_time() -> None:
    """`Windowed` with a table stops where the table says that it is fast enough."""

    def loss(plan: SkipPlan, samples: int | None = None) -> float:
        return float(sum(s.layer for s in plan.windows.decode))

    policy = Windowed(loss, HEADS, WINDOWS[0], context=256, per="layer", table=costs())
    plans = policy.plans(profile(3), 1.3)
    empty = SkipPlan.empty(plans[0].sublayers)
    speed = [planted("decode", 256, empty) / planted("decode", 256, plan) for plan in plans]
    assert speed[-1] >= 1.3 > speed[-2]
    assert [len(plan.windows.decode) for plan in plans] == list(range(len(plans)))
    with pytest.raises(ValueError, match="alpha must be from 1 to"):
        policy.plan(profile(3), 9.0)
    policy.check(BANK.model)
    other = compiled_llamas.make_model("grouped")
    with pytest.raises(TableError, match="the table is of the model"):
        policy.check(other)


def test_all_sublayers_are_named() -> None:
    assert {s for s, n in zip(BANK.sublayers, costs().kv_heads, strict=True) if n} == set(HEADS)
    assert all(isinstance(s, Sublayer) for s in HEADS)
