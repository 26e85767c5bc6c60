"""Decisions of several plans: what they refuse, say, save, and do at run time."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.contrib.routing import Choice, Option
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.decision_files import load_decision, save_decision
from adaskip_fx.plans.decisions import Decision, PlanSet, Schedule, map_plans
from adaskip_fx.plans.phase_split import decode_only, prefill_only
from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogate, Surrogates
from adaskip_fx.runtime.report import runtime_report
from adaskip_fx.testing import assert_equivalent
from adaskip_fx.testing.equivalence import compiled_for
from tests.support.compiled_llamas import (
    SEEDS,
    STEPS,
    Entry,
    entry,
    fewer,
    fixed,
    make_model,
    scales,
)
from tests.support.decisions import EMPTY, NAMES, SHAPE, SUBLAYERS, Reference, check
from tests.support.eager_reference import assert_close
from tests.support.families.all import tiny_config, tiny_model
from tests.support.generation import padded, running_ahead


def plan_of(decode: dict[str, str], prefill: dict[str, str] | None = None, **more: Any) -> SkipPlan:
    maps = (
        {Sublayer.parse(name): Action(action) for name, action in given.items()}
        for given in (prefill or {}, decode)
    )
    return SkipPlan(SUBLAYERS, *maps, **more)


LESS = plan_of({"1.attention": "kv_only"})
LEAST = plan_of({"0.ffn": "skip", "1.attention": "kv_only", "2.ffn": "skip"})
SCHEDULE = Schedule(((0, EMPTY), (2, LESS), (5, LEAST)))


def test_the_plan_of_a_step() -> None:
    plans = [SCHEDULE.at(step) for step in (0, 1, 2, 4, 5, 99)]
    assert plans == [EMPTY, EMPTY, LESS, LESS, LEAST, LEAST]
    assert SCHEDULE.at(-1) is EMPTY
    assert SCHEDULE.at(7) is SCHEDULE.at(8), "a decode step looks its program up by identity"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((), "the steps of a schedule rise from 0, got []"),
        (((1, EMPTY),), "the steps of a schedule rise from 0, got [1]"),
        (((0, EMPTY), (3, LESS), (3, LEAST)), "rise from 0, got [0, 3, 3]"),
        (
            ((0, EMPTY), (2, SkipPlan.of(SUBLAYERS, ["1.ffn"]))),
            "step 2: 1.ffn is skip in prefill, but run from step 0 on; a schedule changes decode",
        ),
        (
            (
                (0, SkipPlan.of(SUBLAYERS, ["1.ffn"])),
                (4, SkipPlan.of(SUBLAYERS, ["1.ffn"], surrogates=scales({"1.ffn": 0.5}))),
            ),
            "step 4: what prefill skips has other surrogates than at step 0",
        ),
        (
            ((0, EMPTY), (1, replace(EMPTY, last_token_full=True))),
            "step 1: last_token_full is not as at step 0",
        ),
        (
            ((0, EMPTY), (1, SkipPlan.empty(SUBLAYERS[:4]))),
            "the plans of a schedule are for different models: their sublayers differ",
        ),
    ],
)
def test_schedules_that_are_refused(steps: Any, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        Schedule(steps)


def test_holes_in_the_cache_are_refused_as_in_any_plan() -> None:
    with pytest.raises(
        PlanError, match=r"1\.attention: run in prefill but skip in decode: its K/V"
    ):
        plan_of({"1.attention": "skip"})


DECISIONS: list[Schedule | Choice] = [
    SCHEDULE,
    Choice((Option("code", LESS, (0.1, -3.0)), Option("prose", LEAST, (1e-7, 2.0)))),
]


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda d: d.kind)
def test_saved_and_loaded(decision: Schedule | Choice, tmp_path: Path) -> None:
    folder = tmp_path / "decision"
    save_decision(decision, folder)
    loaded = load_decision(folder)
    assert loaded == decision
    assert loaded.digest == decision.digest
    assert str(loaded) == str(decision)
    assert pickle.loads(pickle.dumps(decision)) == copy.deepcopy(decision) == decision
    save_decision(map_plans(decision, lambda plan: plan), folder)  # over it
    assert load_decision(folder) == decision


def test_sets_of_plans_that_say_nothing_of_files(tmp_path: Path) -> None:
    class Two(PlanSet):
        kind = "pair"

        @property
        def plans(self) -> tuple[SkipPlan, ...]:
            return LESS, LEAST

    with pytest.raises(PlanError, match="a pair cannot be saved; save its plans"):
        save_decision(Two(), tmp_path / "pair")  # type: ignore[arg-type]
    assert not (tmp_path / "pair").exists()
    with pytest.raises(PlanError, match="the plans of a pair cannot be exchanged"):
        map_plans(Two(), lambda plan: plan)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="a pair cannot be loaded; load its plans"):
        Two.from_entries([])
    assert Two().rows() == [("plan 1", LESS), ("plan 2", LEAST)]
    assert len(Two().digest) == 16


def test_surrogates_that_are_tensors_go_along(tmp_path: Path) -> None:
    width = 8
    diagonal = Surrogate("diagonal", {"factor": np.linspace(0.5, 1.5, width, dtype=np.float32)})
    plans = [LEAST.with_surrogates(Surrogates({Sublayer(0, "ffn"): diagonal})), LESS]
    decision = Schedule(((0, plans[1]), (3, plans[0])))
    save_decision(decision, tmp_path / "d")
    assert load_decision(tmp_path / "d") == decision
    (kept,) = (path for path in (tmp_path / "d").iterdir() if path.suffix == ".safetensors")
    save_decision(SCHEDULE, tmp_path / "d")
    assert not kept.exists()


def test_saving_over_another_leaves_nothing_behind(tmp_path: Path) -> None:
    save_decision(SCHEDULE, tmp_path / "d")
    save_decision(Schedule(((0, LESS),)), tmp_path / "d")
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert names == {"decision.json", f"plan-{LESS.digest}.json"}


def test_files_that_are_refused(tmp_path: Path) -> None:
    save_decision(SCHEDULE, tmp_path / "s")
    with pytest.raises(PlanError, match="no such file"):
        load_decision(tmp_path / "none")
    document = tmp_path / "s" / "decision.json"
    data = json.loads(document.read_text())
    changes: list[tuple[Callable[[Any], Any], str]] = [
        (lambda d: d.update(kind="oracle"), "unknown kind 'oracle'; make the decision again"),
        (lambda d: d.update(kind="plan per stage"), "unknown kind 'plan per stage'; load the plan"),
        (lambda d: d["entries"][1].update(first_step=3), "edited after it was saved"),
        (lambda d: d["entries"][1].pop("first_step"), "not a valid schedule .KeyError.'first_step"),
        (lambda d: d["entries"][1].update(plan="../x"), "not a valid schedule"),
        (lambda d: d.update(schema=2), r"schema 2 is newer than this version reads \(1\)"),
    ]
    for change, message in changes:
        broken = copy.deepcopy(data)
        change(broken)
        document.write_text(json.dumps(broken))
        with pytest.raises(PlanError, match=message):
            load_decision(tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(PlanError, match=re.escape("holds other files (notes.txt)")):
        save_decision(SCHEDULE, tmp_path / "other")
    with pytest.raises(PlanError, match="is a file, but this decision is a folder"):
        save_decision(SCHEDULE, tmp_path / "other" / "notes.txt")


def test_what_is_printed() -> None:
    assert str(SCHEDULE) == (
        f"Schedule {SCHEDULE.digest[:8]}: 3 decode plans of 6 sublayers; prefill skips 0\n"
        "from token 0: decode leaves out 0 of 6\n"
        "from token 2: decode leaves out 1 of 6, 1 of them with their K/V written: attention 1\n"
        "from token 5: decode leaves out 3 of 6, 1 of them with their K/V written: attention 1, "
        "ffn 0 2"
    )
    assert "prose: decode leaves out 3 of 6" in str(DECISIONS[1])


def test_digests_tell_decisions_apart() -> None:
    others = [
        Schedule(((0, EMPTY), (3, LESS), (5, LEAST))),
        Schedule(((0, EMPTY), (2, LEAST), (5, LEAST))),
        Schedule(((0, EMPTY), (2, LESS))),
    ]
    assert len({SCHEDULE.digest, *(d.digest for d in others)}) == 4
    assert replace(EMPTY, last_token_full=True).digest != EMPTY.digest
    assert replace(EMPTY, last_token_full=True) != EMPTY


def test_last_token_full_survives_its_file(tmp_path: Path) -> None:
    plan = replace(LESS, last_token_full=True)
    plan.save(tmp_path / "plan.json")
    assert SkipPlan.load(tmp_path / "plan.json") == plan
    assert "the last token of a prompt runs as in decode" in str(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan.with_decode_extra([Sublayer(2, "ffn")]).last_token_full


# At run time -----------------------------------------------------------------------------------


LONG = (6, *[1] * 8, 4, *[1] * 6)  # two turns: the schedule begins again


@pytest.mark.parametrize(
    ("bank", "batch"),
    [(entry, 2), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((entry, 1), (fixed, 1)))],
)
def test_a_schedule_switches_as_the_oracle_does(bank: Any, batch: int) -> None:
    check(bank(SHAPE), SCHEDULE, SCHEDULE.at, LONG, batch=batch)


@pytest.mark.parametrize(
    "wrong",
    [lambda step: EMPTY, lambda step: SCHEDULE.at(step + 1), lambda step: SCHEDULE.at(step - 1)],
)
def test_an_oracle_that_switches_otherwise_differs(wrong: Callable[[int], SkipPlan]) -> None:
    with pytest.raises(AssertionError, match=r"step [2-8]: relative error"):
        check(entry(SHAPE), SCHEDULE, wrong, LONG)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    firsts = sorted({0, *draw(st.lists(st.integers(1, 6), max_size=3))})
    kinds = {"attention": ("run", "kv_only"), "ffn": ("run", "skip")}

    def one() -> SkipPlan:
        chosen = {n: draw(st.sampled_from(kinds[n.split(".")[1]])) for n in NAMES[:-1]}
        return plan_of(chosen, surrogates=scales({"1.ffn": 0.75, "1.attention": 1.25}))

    return Schedule(tuple((first, one()) for first in firsts))


@fewer(3)
@given(schedules(), STEPS, SEEDS)
def test_any_schedule(schedule: Schedule, steps: tuple[int, ...], seed: int) -> None:
    check(entry(SHAPE), schedule, schedule.at, steps, seed=seed)


def test_generate_follows_a_schedule_and_ends_ahead_of_it() -> None:
    """A run that its tokens end, a step too many taken back, and the turn goes on."""
    bank = entry(SHAPE)
    ids = bank.tokens(1, 6)
    switching = Schedule(tuple((step, (EMPTY, LEAST)[step % 2]) for step in range(12)))
    with decided(bank, switching), running_ahead(bank):
        free = bank.compiled.generate(ids, max_new_tokens=9, do_sample=False)
        end = int(free[0, -4])
        new = [int(t) for t in free[0, 6:]]
        stop = {"eos_token_id": end, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
        result = bank.compiled.generate(ids, **options, **stop)
        cache, reference = result.past_key_values, Reference(bank, switching.at)
        expected = [reference.step(ids)]
        for token in new[: new.index(end)]:
            expected.append(reference.step(torch.tensor([[token]])))
        tokens = [int(logits[0, -1].argmax()) for logits in expected]
        assert tokens == result.sequences[0, 6:].tolist() == new[: new.index(end) + 1]
        for token in (end, 7, 8):
            token_ids = torch.tensor([[token]])
            with torch.no_grad():
                logits = bank.compiled(token_ids, past_key_values=cache).logits
            assert_close(logits, reference.step(token_ids), bank.tolerance, f"token {token}")
    bank.oracle.behave({})


@contextmanager
def decided(bank: Entry, decision: Decision) -> Iterator[None]:
    before, bank.runtime.plan = bank.runtime.plan, decision
    try:
        yield
    finally:
        bank.runtime.plan = before


def test_a_token_that_is_cropped_takes_its_step_back() -> None:
    bank, reference = entry(SHAPE), Reference(entry(SHAPE), SCHEDULE.at)
    cache = bank.runtime.new_cache(plan=SCHEDULE)
    tokens = [bank.tokens(1, 1, seed) for seed in range(4)]
    with torch.no_grad():
        for ids in (bank.tokens(1, 5), *tokens[:2]):
            reference.step(ids)
            bank.compiled(ids, past_key_values=cache)
        bank.compiled(tokens[2] * 0, past_key_values=cache)
        cache.crop(-1)
        logits = bank.compiled(tokens[2], past_key_values=cache).logits
    assert_close(logits, reference.step(tokens[2]), bank.tolerance)
    bank.oracle.behave({})


def test_a_copied_request_goes_on_with_the_schedule() -> None:
    bank, reference = entry(SHAPE), Reference(entry(SHAPE), SCHEDULE.at)
    cache = bank.runtime.new_cache(plan=SCHEDULE)
    with torch.no_grad():
        for ids in (bank.tokens(1, 5), *[bank.tokens(1, 1, seed) for seed in range(3)]):
            reference.step(ids)
            bank.compiled(ids, past_key_values=cache)
        twin, ids = copy.deepcopy(cache), bank.tokens(1, 1, 9)
        logits = bank.compiled(ids, past_key_values=twin).logits
    assert_close(logits, reference.step(ids), bank.tolerance)
    bank.oracle.behave({})


# The last token of a prompt --------------------------------------------------------------------

POP = plan_of({}, {"1.attention": "kv_only", "2.ffn": "skip"}, last_token_full=True)


@pytest.mark.parametrize(
    ("bank", "keep"),
    [
        (entry, 1),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((entry, 0), (entry, 3), (fixed, 1))),
    ],
)
def test_the_last_token_of_a_prompt_runs_in_full(bank: Any, keep: int) -> None:
    check(bank(SHAPE), POP, lambda step: POP, (7, 1, 1, 4, 1, 2, 1), keep=keep)


@pytest.mark.parametrize("bank", [entry, fixed])
def test_prompts_of_one_token_run_in_full(bank: Any) -> None:
    check(bank(SHAPE), POP, lambda step: POP, (1, 1, 1, 2, 1))
    other = replace(POP, last_token_full=False)
    with pytest.raises(AssertionError, match="step 0: relative error"):
        check(bank(SHAPE), other, lambda step: POP, (1,))


@pytest.mark.slow
def test_a_mixers_state_is_written_where_only_a_phase_leaves_it_out() -> None:
    """A schedule on a model that keeps states, which cannot be taken back, warmed up as well."""
    model = tiny_model(tiny_config("jamba"))
    compiled = compiled_for(model)
    runtime = runtime_of(compiled)
    skipping = SkipPlan.of(runtime.sublayers, runtime.sublayers[:-1:2])
    plans = SkipPlan.empty(runtime.sublayers), decode_only(skipping)
    for plan in (plans[1], prefill_only(skipping, last_token_full=False)):
        assert Action.KV_ONLY in {*plan.prefill.values(), *plan.decode.values()}
        assert_equivalent(model, plan, inputs={"input_ids": torch.ones(1, 5, dtype=torch.int64)})
    with pytest.raises(ValueError, match="assert_equivalent runs a prompt as one step"):
        assert_equivalent(model, replace(plans[0], last_token_full=True))
    runtime.plan = Schedule(((0, plans[0]), (2, plans[1])))
    runtime.warmup(32)
    before = runtime.counters.links
    cache = runtime.new_cache()
    with torch.no_grad():
        for count in (5, 1, 1, 1):
            compiled(torch.ones(1, count, dtype=torch.int64), past_key_values=cache)
    assert cache.request.decode_plan is plans[1]
    assert runtime.counters.links <= before + 1, "all logits of a prompt are another graph"


def test_an_oracle_whose_last_token_is_like_the_others_differs() -> None:
    other = replace(POP, last_token_full=False)
    with pytest.raises(AssertionError, match="step 0: relative error"):
        check(entry(SHAPE), POP, lambda step: other, (7, 1))
    with pytest.raises(AssertionError, match="step 0: relative error"):
        check(entry(SHAPE), other, lambda step: POP, (7, 1))


@pytest.mark.slow
def test_the_last_token_of_padded_rows() -> None:
    """Each row as it is alone; the logits that are asked for have the shape of one step's."""
    bank = entry(SHAPE)
    ids, mask, rows = padded(bank)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = bank.runtime.new_cache(plan=POP)
    with torch.no_grad():
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        logits = bank.compiled(ids, **given, logits_to_keep=0).logits
    assert logits.shape[:2] == ids.shape
    for row, alone in enumerate(rows):
        expected = Reference(bank, lambda step: POP).step(alone)
        assert_close(logits[row, -1], expected[0, -1], bank.tolerance, f"row {row}")
    bank.oracle.behave({})


def test_a_step_that_fails_midway_leaves_the_cache_as_it_was() -> None:
    bank = entry(SHAPE)
    runtime: Any = bank.runtime
    cache = runtime.new_cache(plan=POP)
    run = runtime.runner.run

    def failing(phase: str, *rest: Any) -> Any:
        if phase == "decode":
            raise KeyboardInterrupt
        return run(phase, *rest)

    runtime.runner.run = failing
    try:
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            bank.compiled(bank.tokens(1, 5), past_key_values=cache)
    finally:
        del runtime.runner.run
    assert cache.length == 0


def test_decode_that_leaves_less_out_than_prompts_has_the_full_models_cache() -> None:
    """Prompts in full, decode with attention of K/V only: as many bytes as the full model's."""
    bank = entry(SHAPE)
    caches = [check(bank, plan, lambda s, p=plan: p, (5, 1, 1, 3)) for plan in (LEAST, EMPTY)]
    assert caches[0].nbytes == caches[1].nbytes


# What is around ----------------------------------------------------------------------------------


def test_generate_on_a_cache_made_for_a_plan() -> None:
    bank = entry(SHAPE)
    ids = bank.tokens(1, 5)
    cache = bank.runtime.new_cache(plan=LEAST)
    got = bank.compiled.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
    with bank.using(LEAST):
        expected = bank.oracle.model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_a_compiled_model_says_what_was_decided() -> None:
    from adaskip_fx.api import build

    decision = SCHEDULE

    compiled = build(make_model(SHAPE), decision, backend="eager")
    text = runtime_report(runtime_of(compiled))
    assert f"{decision.kind}  " in text
    assert f"{decision.digest[:8]}, {len(decision.plans)} plans" in text
    assert f"off: a {decision.kind} decides how decoding changes" in text
    captures = runtime_of(compiled).counters.captures
    compiled.adaskip.warmup(32)
    before = runtime_of(compiled).counters.links
    cache = compiled.adaskip.new_cache()
    with torch.no_grad():
        for count in (8, *[1] * 7):
            ids = torch.zeros(1, count, dtype=torch.int64)
            compiled(ids, past_key_values=cache, logits_to_keep=1)
    assert runtime_of(compiled).counters.links == before, "warmup linked every plan"
    assert runtime_of(compiled).counters.captures == captures + 1, "of the decode step"
    del cache


def test_a_decision_of_another_model_is_refused() -> None:
    from adaskip_fx.api import build

    with pytest.raises(PlanError, match="the plan is for 6 sublayers"):
        build(make_model("one_layer"), SCHEDULE, backend="eager")
