"""Latency tables: planted costs come back from a clock that is not real, and files survive."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.api import build
from adaskip_fx.latency import table
from adaskip_fx.latency.table import LatencyTable, is_table
from adaskip_fx.latency.terms import Costs, TableError, cost_terms
from adaskip_fx.measurement import measure as measurement
from adaskip_fx.measurement.measure import measure, plans_to_time, solve, steady, sublayer_classes
from adaskip_fx.measurement.timer import StepTimer
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import Action, Phase, SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.profiles.fingerprint import fingerprint
from tests.support import compiled_llamas
from tests.support.families.all import tiny_config, tiny_model

SHAPE = "four_layers"
PLANTED = {"rest": 3.0, "attention": 0.5, "ffn": 0.25, "scale": 0.0625, "stored": 0.125}


def planted(phase: Phase, context: int, plan: SkipPlan) -> float:
    """Seconds, added up sublayer by sublayer; a prompt's attention is quadratic."""
    tokens = context if phase == "prefill" else 1
    width = context / 64
    cost = {
        "attention": PLANTED["attention"] * tokens * (1 + width),
        "ffn": PLANTED["ffn"] * tokens,
        "scale": PLANTED["scale"] * tokens,
    }
    total = PLANTED["rest"]
    scaled = False  # whether the stream has just been scaled: neighbours become one factor
    for sublayer in plan.sublayers:
        action = plan.action(phase, sublayer)
        if action is Action.RUN:
            total, scaled = total + cost[sublayer.kind], False
        elif action is Action.KV_ONLY:
            total, scaled = total + PLANTED["stored"] * tokens, False
        elif sublayer in plan.surrogates.factors:
            total, scaled = total + (0 if scaled else cost["scale"]), True
    return total


class Clock:
    """Planted times, each made slower by `slow(number of the sample)`; remembers what it timed."""

    def __init__(self, slow: Callable[[int], float] = lambda _: 1.0) -> None:
        self.slow = slow
        self.timed: list[tuple[Phase, int, SkipPlan]] = []

    def __call__(self, phase: Phase, context: int, plan: SkipPlan) -> float:
        self.timed.append((phase, context, plan))
        return planted(phase, context, plan) * self.slow(len(self.timed) - 1)


def measured(clock: Clock, contexts: Sequence[int] = (64, 256), **options: Any) -> LatencyTable:
    return measure(compiled_llamas.entry(SHAPE).compiled, contexts, time_step=clock, **options)


def of_family(name: str) -> Any:
    return runtime_of(build(tiny_model(tiny_config(name)), None, backend="eager"))


def wrong(table: LatencyTable) -> float:
    """The greatest relative error of a random plan's predicted time."""
    sublayers = table.sublayers
    plans = [
        SkipPlan.empty(sublayers),
        SkipPlan.of(sublayers, ["0.ffn", "3.attention", "2.attention"]),
        compiled_llamas.entry(SHAPE).plan(["1.ffn", "3.ffn"], factors={"1.ffn": 0.5}),
    ]
    return max(
        abs(table.seconds(plan, c.phase, c.context) / planted(c.phase, c.context, plan) - 1)
        for c in table.costs
        for plan in plans
    )


# Measuring. ------------------------------------------------------------------------------------


def test_planted_costs_come_back() -> None:
    table = measured(Clock())
    assert set(table.classes) == {"attention", "ffn"}
    assert [(c.phase, c.context) for c in table.costs] == [
        *(("prefill", 64), ("prefill", 256)),
        *(("decode", 64), ("decode", 256)),
    ]
    assert wrong(table) < 1e-9
    assert max(c.error for c in table.costs) < 1e-9
    assert dict(table.at("decode", 64)) == pytest.approx(
        {"rest": 3.0, "attention": 1.0, "ffn": 0.25, "scale": 0.0625}
    )


PLANS = 5  # full, half of attention, half of ffn, half of all, and that with scales


def test_a_clock_that_drifts_from_round_to_round() -> None:
    slow = Clock(lambda number: 1 + 0.1 * (number // PLANS))
    assert wrong(measured(slow, [64])) > 0.1  # a factor for all, which speed-ups do not see
    full = compiled_llamas.entry(SHAPE).plan()
    plan = compiled_llamas.entry(SHAPE).plan(["0.attention", "1.ffn", "2.ffn"])
    speed_up = measured(slow, [64]).predict(plan, "decode", 64)
    assert speed_up == pytest.approx(
        planted("decode", 64, full) / planted("decode", 64, plan), rel=1e-9
    )


def test_one_sample_that_is_far_off() -> None:
    assert wrong(measured(Clock(lambda number: 9.0 if number == 2 * PLANS + 1 else 1.0))) < 1e-9


class Unfair(Clock):
    """Slow whenever nothing but FFN sublayers is skipped: such times are no sum of parts."""

    def __call__(self, phase: Phase, context: int, plan: SkipPlan) -> float:
        only_ffn = {s.kind for s in plan.skipped(phase)} == {"ffn"}
        return super().__call__(phase, context, plan) * (1.3 if only_ffn else 1)


def test_times_that_do_not_add_up_are_measured_again_and_told() -> None:
    clock = Unfair()
    table = measured(clock, [64], rounds=2)
    assert len(clock.timed) == 2 * PLANS * (1 + 3 * 2)
    assert max(c.error for c in table.costs) > 0.05
    assert table.warning.startswith("measured times do not add up: the sum of cost terms is")
    fair = Clock()
    assert measured(fair, [64], rounds=2).warning == ""
    assert len(fair.timed) == 2 * PLANS * (1 + 2)


def test_a_few_bad_rounds_are_outvoted_by_more() -> None:
    """Each plan is slow in a round of its own, of which there are only two at first."""
    clock = Clock(lambda number: 2.0 if number in (PLANS + 1, 2 * PLANS + 2) else 1.0)
    assert wrong(measured(clock, [64], rounds=2)) < 1e-9
    assert len(clock.timed) > 2 * PLANS * (1 + 2)


def test_plans_take_turns_and_the_first_round_does_not_count() -> None:
    clock = Clock(lambda number: 50.0 if number % (4 * PLANS) < PLANS else 1.0)
    table = measured(clock, [64], rounds=3)
    assert wrong(table) < 1e-9
    turns = [p for phase, _, p in clock.timed if phase == "decode"]
    forward = turns[:PLANS]
    assert len(set(forward)) == PLANS
    assert turns[PLANS:] == [*forward, *forward[::-1], *forward]


def test_what_is_left_of_a_sublayer_whose_keys_are_stored() -> None:
    table = measured(Clock(), [64], kv_only=True)
    sublayers = table.sublayers
    stored = {Sublayer(1, "attention"): Action.KV_ONLY}
    plan = SkipPlan(sublayers, stored, stored)
    assert table.seconds(plan, "decode", 64) == pytest.approx(planted("decode", 64, plan))
    message = "the cost of 'attention, K/V only' was not measured (known: attention, ffn, rest, "
    with pytest.raises(TableError, match=message.replace("(", r"\(")):
        measured(Clock(), [64]).seconds(plan, "decode", 64)


def test_a_compensation_is_measured_if_asked() -> None:
    table = measured(Clock(), [64], surrogates=())
    assert "scale" not in table.at("decode", 64)
    scaled = compiled_llamas.entry(SHAPE).plan(["1.ffn"], factors={"1.ffn": 0.5})
    plain = compiled_llamas.entry(SHAPE).plan(["1.ffn"])
    assert table.seconds(plain, "decode", 64) == pytest.approx(planted("decode", 64, plain))
    with pytest.raises(TableError, match="the cost of 'scale' was not measured"):
        table.seconds(scaled, "decode", 64)


def test_progress_and_conditions() -> None:
    seen: list[tuple[int, int]] = []
    table = measured(Clock(), batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert table.conditions["batch"] == 2
    assert table.conditions["dtype"] == "float32"
    assert table.conditions["torch"] == str(torch.__version__)
    assert table.fingerprint == fingerprint(compiled_llamas.entry(SHAPE).model)


def test_what_measuring_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for contexts in ((), (8, 64)):
        with pytest.raises(ValueError, match="contexts must be lengths of at least 16 tokens, go"):
            measured(Clock(), contexts)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measured(Clock(), rounds=0)
    runtime = compiled_llamas.entry(SHAPE).runtime
    monkeypatch.setattr(runtime, "warmup", lambda *_: None)
    graphs = sum(captured.nbytes for captured in runtime.graphs._kept.all())
    largest = max((program.nbytes for program in runtime.graphs._programs.all()), default=1)
    monkeypatch.setattr(runtime.budget, "_limit", graphs + PLANS * largest - 1)
    message = f"5 plans are run in turn, but memory_budget={graphs + 5 * largest - 1} holds 4 prog"
    with pytest.raises(ValueError, match=message):
        measured(Clock())


# Its parts. ------------------------------------------------------------------------------------


ODD = st.sampled_from([3, 5, 7]).flatmap(
    lambda n: st.lists(st.floats(0.5, 2), min_size=n, max_size=n)
)


@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=6), ODD, st.data())
def test_steady_finds_what_plans_take(
    plans: list[float], rounds: list[float], data: st.DataObject
) -> None:
    """At the pace of the round in the middle; one sample may be anything."""
    samples = np.outer(plans, rounds)
    plan, turn = (data.draw(st.integers(0, n - 1)) for n in samples.shape)
    samples[plan, turn] *= data.draw(st.floats(0.1, 10))
    expected = np.array(plans) * np.median(rounds)
    assert steady(samples) == pytest.approx(expected, rel=1e-9)


def test_means_would_not() -> None:
    samples = np.outer([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    samples[1, 1] = 20
    assert steady(samples).tolist() == pytest.approx([1, 2, 3])
    assert samples.mean(1)[1] > 7


@given(st.lists(st.floats(0.001, 10), min_size=4, max_size=4))
def test_solving_finds_planted_costs(values: list[float]) -> None:
    names = ["rest", "attention", "ffn", "scale"]
    costs_of = dict(zip(names, values, strict=True))
    sublayers = compiled_llamas.entry(SHAPE).sublayers
    classes = tuple(s.kind for s in sublayers)
    plans = plans_to_time(sublayers, classes, [Surrogates.scale(dict.fromkeys(sublayers, 1.0))])
    counts = [cost_terms(p, "decode", sublayers, classes) for p in plans]
    seconds = [sum(n * costs_of[name] for name, n in row.items()) for row in counts]
    found, error = solve(counts, seconds)
    assert error < 1e-9
    assert found == pytest.approx(costs_of, rel=1e-6, abs=1e-9)
    seconds[1] *= 1.1
    assert solve(counts, seconds)[1] > 0.001


def test_no_cost_is_negative() -> None:
    """A scale that seems to save time costs nothing; the other costs are fitted without it."""
    rows = [{"rest": 1, "ffn": 4}, {"rest": 1, "ffn": 2}, {"rest": 1, "ffn": 2, "scale": 2}]
    found, error = solve(rows, [5.0, 3.0, 2.9])
    assert found["scale"] == 0
    assert found["ffn"] == pytest.approx(1, rel=0.05)
    assert 0.001 < error < 0.04


def test_plans_to_time_of_small_models() -> None:
    """At least one sublayer runs; and one alone cannot be chosen from."""
    one = (Sublayer(0, "attention"), Sublayer(0, "ffn"))
    skipped = [[str(s) for s in p.prefill] for p in plans_to_time(one, ("attention", "ffn"))]
    assert skipped == [[], ["0.attention"], ["0.ffn"], ["0.attention"]]
    for sublayers, classes in (((Sublayer(0, "mixer"),), ("mixer",)), (one, ("", ""))):
        with pytest.raises(ValueError, match=r"nothing to choose: of [12] sublayers none can"):
            plans_to_time(sublayers, classes)


def test_classes_are_told_by_code() -> None:
    """Gemma 2's attention slides in every other layer; its FFN is one code."""
    runtime = of_family("gemma2")
    classes = dict(zip(map(str, runtime.sublayers), sublayer_classes(runtime), strict=True))
    assert classes["0.attention"] == "attention 1" != classes["1.attention"] == "attention 2"
    assert {name for s, name in classes.items() if "ffn" in s} == {"ffn"}
    assert set(sublayer_classes(compiled_llamas.entry(SHAPE).runtime)) == {"attention", "ffn"}


def test_what_cannot_be_skipped_is_of_no_class() -> None:
    names = (Sublayer(0, "attention"), Sublayer(0, "ffn"), Sublayer(1, "attention"))
    keys = {names[0]: ("a",), names[1]: ("f",), names[2]: ("b",)}
    graphs = SimpleNamespace(keys=keys, structure=SimpleNamespace(unskippable={names[0]}))
    runtime: Any = SimpleNamespace(sublayers=names, graphs=graphs)
    assert sublayer_classes(runtime) == ("", "ffn", "attention")


# The clock. ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [SHAPE, "static cache", pytest.param("mamba", marks=pytest.mark.slow)]
)
def test_the_clock_runs_what_it_says(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens stored, plan and number of steps of each sample; no time is asserted."""
    if shape == "static cache":  # as on a GPU
        model = compiled_llamas.entry(SHAPE).model
        runtime = runtime_of(build(model, None, backend="eager", static_cache=True))
    else:
        runtime = compiled_llamas.entry(SHAPE).runtime if shape == SHAPE else of_family(shape)
    plan = SkipPlan.of(runtime.sublayers, runtime.sublayers[1:3])
    seen: list[tuple[str, int, int]] = []
    run = runtime.runner.run

    def spy(phase: str, request: Any, ran: SkipPlan, probed: Any, *rest: Any) -> Any:
        (ids, *_), cache, _ = rest
        assert ids.shape[0] == 2
        if phase == "decode" or request.plan is plan:
            assert ran is plan
            assert probed == ()
        seen.append((phase, cache.length, ids.shape[1]))
        return run(phase, request, ran, probed, *rest)

    monkeypatch.setattr(runtime.runner, "run", spy)
    clock = StepTimer(runtime, batch=2, steps=3)
    assert clock("prefill", 20, plan) > 0
    assert set(seen) == {("prefill", 0, 20)}
    assert len(seen) <= 3
    seen.clear()
    steps = [("decode", 16 + i, 1) for i in range(4)]
    for _ in range(2):
        assert clock("decode", 20, plan) > 0
    assert runtime.why_no_static_cache is None
    if shape != "mamba":  # the last step is the one that stores token 20, again and again
        assert seen == [("prefill", 0, 16), *steps, *steps]
    else:  # states cannot be taken back, so the second sample goes on
        assert seen == [("prefill", 0, 16), *steps, *(("decode", 20 + i, 1) for i in range(4))]
        for _ in range(100):
            clock("decode", 20, plan)
        assert 2 <= seen.count(("prefill", 0, 16)) < 10
        assert max(length for _, length, _ in seen) < 300
    seen.clear()
    clock("decode", 30, plan)
    assert seen[0] == ("prefill", 0, 26)


# The table. ------------------------------------------------------------------------------------

SUBLAYERS = tuple(Sublayer(i, kind) for i in range(2) for kind in ("attention", "ffn"))
CLASSES = ("attention", "ffn", "attention", "ffn")
CONDITIONS = {"device": "CPU (x)", "dtype": "float32", "batch": 1}


def made(**changes: Any) -> LatencyTable:
    """Costs that grow as attention's do: a n + b n² in a prompt, c + d n in a step."""
    entries = [
        Costs(
            "prefill",
            n,
            {"rest": 1.0 + n, "attention": 2.0 * n + n * n, "ffn": 3.0 * n, "scale": 0.5 * n},
            0.01,
        )
        for n in (100, 300)
    ]
    entries += [
        Costs("decode", n, {"rest": 1.0, "attention": 2.0 + n / 100, "ffn": 1.0, "scale": 0.0})
        for n in (300, 100)
    ]
    given_: dict[str, Any] = {
        "fingerprint": fingerprint(compiled_llamas.entry(SHAPE).model),
        "conditions": CONDITIONS,
        "sublayers": SUBLAYERS,
        "classes": CLASSES,
        "costs": tuple(entries),
    }
    return LatencyTable(**{**given_, **changes})


def test_between_contexts() -> None:
    prefill, decode = made().at("prefill", 200), made().at("decode", 150)
    assert dict(prefill) == pytest.approx(
        {"rest": 201, "attention": 400 + 40000, "ffn": 600, "scale": 100}
    )
    assert dict(decode) == pytest.approx({"rest": 1, "attention": 3.5, "ffn": 1, "scale": 0})
    for context in (99, 301):
        message = f"decode at {context} tokens: measured were 100, 300; measure again"
        with pytest.raises(TableError, match=message):
            made().at("decode", context)


def test_predicting() -> None:
    """A speed-up is the full model's seconds over the plan's, added up by hand."""
    scale = Surrogates.scale({SUBLAYERS[0]: 0.5})
    plan = SkipPlan.of(SUBLAYERS, ["0.attention", "1.ffn"], surrogates=scale)
    full, less = 101 + 2 * 10200 + 2 * 300, 101 + 10200 + 300 + 50
    assert made().predict(plan, "prefill", 100) == pytest.approx(full / less)
    step, short = 1 + 2 * 3 + 2, 1 + 3 + 1
    assert made().predict(plan, "decode", 100) == pytest.approx(step / short)
    weights: dict[Phase, float] = {"prefill": 1, "decode": 1000}
    assert made().predict(plan, weights, 100) == pytest.approx(
        (full + 1000 * step) / (less + 1000 * short)
    )
    assert made().predict(SkipPlan.empty(SUBLAYERS), "prefill", 100) == 1


def test_decode_extras_count_in_decode_only() -> None:
    plan = SkipPlan.of(SUBLAYERS, ["0.attention"])
    more = plan.with_decode_extra([SUBLAYERS[3]])
    table = made()
    assert table.predict(more, "prefill", 100) == table.predict(plan, "prefill", 100)
    assert table.predict(more, "decode", 100) > table.predict(plan, "decode", 100)


def test_plans_of_another_model_or_of_what_cannot_be_skipped() -> None:
    with pytest.raises(TableError, match="the plan has 2 sublayers and the table 4, or"):
        made().predict(SkipPlan.empty(SUBLAYERS[:2]), "decode", 100)
    fixed = made(classes=("", "ffn", "attention", "ffn"))
    plan = SkipPlan.of(SUBLAYERS, ["0.attention"])
    with pytest.raises(TableError, match=r"0.attention cannot be skipped: later layers read what"):
        fixed.predict(plan, "decode", 100)
    other = SkipPlan.of(SUBLAYERS, ["1.attention"])
    assert fixed.predict(other, "decode", 100) == (1 + 3 + 2) / (1 + 2)


def test_round_trip(tmp_path: Path) -> None:
    table, file = made(), tmp_path / "table.json"
    table.save(file)
    loaded = LatencyTable.load(file)
    assert loaded == table
    assert hash(loaded) == hash(table)
    assert loaded.digest == table.digest
    assert pickle.loads(pickle.dumps(table)) == copy.deepcopy(table) == table
    assert is_table(file)
    SkipPlan.empty(SUBLAYERS).save(tmp_path / "plan.json")
    assert not is_table(tmp_path / "plan.json")
    assert not is_table(tmp_path)


def test_every_number_is_in_the_digest() -> None:
    table = made()
    first = table.costs[0]
    dearer = dataclasses.replace(first, seconds={**first.seconds, "ffn": 300.0000001})
    changed = [
        made(conditions={**CONDITIONS, "batch": 2}),
        made(classes=("attention", "ffn", "attention", "attention")),
        made(costs=(dearer, *table.costs[1:])),
        made(costs=(dataclasses.replace(first, error=0.02), *table.costs[1:])),
    ]
    assert len({t.digest for t in (table, *changed)}) == 5


def test_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    made().save(file)
    document = json.loads(file.read_text())
    document["costs"][0]["seconds"]["ffn"] *= 2
    cases = [
        (document, "edited after it was saved"),
        ({**document, "schema": 2}, "schema 2 is newer than this version reads"),
        ({**document, "costs": []}, "not a valid latency table (a table needs one class for each"),
        ({**document, "classes": ["ffn"]}, "a table needs one class for each sublayer, and costs"),
        (
            {**document, "costs": [{"phase": "prefill", "context": 9, "seconds": {"rest": -1}}]},
            "costs must be at least 0 and name 'rest'",
        ),
        (
            {**document, "costs": [{"phase": "extend", "context": 9, "seconds": {"rest": 1}}]},
            "unknown phase 'extend'",
        ),
        (
            {**document, "costs": [{"phase": "decode", "context": 9, "seconds": {"rest": 1}}]},
            "decode at 9: no cost of attention",
        ),
    ]
    for data, message in cases:
        file.write_text(json.dumps(data))
        with pytest.raises(TableError) as caught:
            LatencyTable.load(file)
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"{file}: ")
        assert "measure again (adaskip-fx measure)" in str(caught.value)


def test_the_printed_table() -> None:
    lines = str(made()).splitlines()
    assert lines[0] == (
        f"LatencyTable {made().digest[:8]}: llama, ms; device CPU (x), dtype float32, batch 1"
    )
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[1:]]
    assert cells[0] == [
        *("phase", "context", "rest", "attention (2)", "ffn (2)", "scale", "off by")
    ]
    assert cells[1] == ["prefill", "100", "1.01e+05", "1.02e+07", "3e+05", "5e+04", "1.0%"]
    assert cells[4] == ["decode", "100", "1000", "3000", "1000", "0", "0.0%"]


def test_of_which_model_and_device() -> None:
    model = compiled_llamas.entry(SHAPE).model
    fitting = made(conditions={"device": table.device_name(model), "dtype": "float32"})
    fitting.check(model)
    with pytest.raises(TableError, match=r"the table is of the model .* measure again"):
        fitting.check(compiled_llamas.entry("grouped").model)
    message = (
        "the table was measured with device Some GPU, but the model has CPU .*; measure again "
        r"\(adaskip-fx measure\), or make a plan with it and pass that"
    )
    with pytest.raises(TableError, match=message):
        made(conditions={**fitting.conditions, "device": "Some GPU"}).check(model)
    with pytest.raises(TableError, match="with dtype bfloat16, but the model has float32"):
        made(conditions={**fitting.conditions, "dtype": "bfloat16"}).check(model)


def test_phases_are_those_of_plans() -> None:
    assert measurement.PHASES == ("prefill", "decode")
