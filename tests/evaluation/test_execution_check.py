"""What ran is read from what was run: counted by hand, and refused where it is not the plan."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adaskip_fx.contrib.routing import Choice, Option, mean_embedding
from adaskip_fx.evaluation.examples import Generate, Recall
from adaskip_fx.evaluation.execution_check import (
    NotMeasuredError,
    PhaseRan,
    Ran,
    SkipPathError,
    check_followed,
    watched,
)
from adaskip_fx.evaluation.scoring import score
from adaskip_fx.plans.decisions import Decision, Schedule
from adaskip_fx.plans.skip_plan import Action, SkipPlan
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies import AdaSkip
from adaskip_fx.programs import program
from tests.support.compiled_llamas import entry, profile_of
from tests.support.toy_models import SUBLAYERS, Compiled, compiled, encoded, tokenizer

PROMPT = encoded("Some text, and more of it")


def ran(model: Any, *examples: Generate | Recall) -> Ran:
    with watched(model) as watch:
        assert watch is not None
        for example in examples:
            score(model, tokenizer(), example)
        return watch.read()


def generate(limit: int) -> Generate:
    return Generate(PROMPT, ("x",), "contains", limit)


def counts(phase: PhaseRan) -> dict[str, int]:
    return {str(s): n for s, n in phase.ran.items()}


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"link": "fused"}, marks=pytest.mark.slow), {"static_cache": True}],
)
def test_prompts_and_decode_steps_are_counted_apart(options: dict[str, Any]) -> None:
    subject = compiled(**options)
    with subject.using("0.attention", decode_extra=["1.ffn"]) as fast:
        found = ran(fast, generate(4), Recall(PROMPT, encoded("abc")))
        plan = subject.runtime.plan
    tokens = 2 * len(PROMPT) + 2  # the second with all of its answer but the last token
    assert (found.prefill.steps, found.prefill.tokens) == (2, tokens)
    assert counts(found.prefill) == {
        "0.attention": 0,
        "0.ffn": tokens,
        "1.attention": tokens,
        "1.ffn": tokens,
    }
    assert found.prefill.fraction == 0.25
    assert (found.decode.steps, found.decode.tokens) == (3, 3)  # the prompt gave the first token
    assert counts(found.decode) == {"0.attention": 0, "0.ffn": 3, "1.attention": 3, "1.ffn": 0}
    assert found.decode.fraction == 0.5
    assert found.plans == (plan.digest,)
    assert found.to_json() == {
        "prefill": {
            "steps": 2,
            "tokens": tokens,
            "skipped_fraction": 0.25,
            "tokens_skipped": {"0.attention": tokens},
        },
        "decode": {
            "steps": 3,
            "tokens": 3,
            "skipped_fraction": 0.5,
            "tokens_skipped": {"0.attention": 3, "1.ffn": 3},
        },
        "plans": [plan.digest],
    }
    assert subject.runtime.observer is None  # and nobody watches any more


def test_a_plan_that_skips_nothing_is_fine() -> None:
    found = ran(compiled().fast, Recall(PROMPT, encoded("abc")))
    assert found.prefill.fraction == 0
    assert found.decode.fraction is None
    assert found.decode.tokens == 0


def test_what_the_window_adds_counts_from_then_on() -> None:
    similarity = {"0.attention": 0.1, "0.ffn": 0.0, "1.attention": 0.0, "1.ffn": 0.0}
    profile = profile_of(SimpleNamespace(sublayers=SUBLAYERS), similarity)  # type: ignore[arg-type]

    class AddsOne(AdaSkip):
        def online_plan(self, profile: Any, plan: Any, window: Any, probed: Any) -> Any:
            return plan.with_decode_extra([SUBLAYERS[1]])

    subject = compiled()
    with subject.using("0.attention", policy=AddsOne(window=2), profile=profile) as fast:
        found = ran(fast, generate(6))
    assert counts(found.decode) == {"0.attention": 0, "0.ffn": 2, "1.attention": 5, "1.ffn": 5}
    assert found.decode.fraction == pytest.approx(8 / 20)
    assert len(found.plans) == 2


def test_programs_say_what_they_call() -> None:
    """Beside `Program.runs`: how many calls the linked program has, and of what."""
    subject, calls = compiled(), []
    for skip in ([], ["0.attention"], ["0.attention", "1.ffn"]):
        with subject.using(*skip) as fast:
            seen: list[program.Program] = []
            subject.runtime.observer = lambda program, plan, tokens, s=seen: s.append(program)
            score(fast, tokenizer(), Recall(PROMPT, encoded("abc")))
            subject.runtime.observer = None
        function: Any = seen[0]._function
        calls.append(Counter(step.function for step in function._program))
        assert {str(s) for s in SUBLAYERS} - {str(s) for s in seen[0].runs} == set(skip)
    assert [c.total() for c in calls] == [calls[0].total() - n for n in (0, 1, 2)]
    assert (calls[0] - calls[1]).total() == 1
    assert sorted((calls[0] - calls[2]).values()) == [1, 1]  # one attention and one ffn


def test_schedules_are_followed_step_by_step() -> None:
    kept = {SUBLAYERS[0]: Action.KV_ONLY, SUBLAYERS[1]: Action.SKIP}
    less = SkipPlan(SUBLAYERS, {}, kept)
    schedule = Schedule(((0, SkipPlan.empty(SUBLAYERS)), (2, less)))
    found = _under(schedule, generate(6))
    assert counts(found.decode) == {"0.attention": 2, "0.ffn": 2, "1.attention": 5, "1.ffn": 5}
    assert found.plans == tuple(p.digest for p in schedule.plans)


def test_choices_are_followed() -> None:
    plans = [SkipPlan.of(SUBLAYERS, [name]) for name in ("0.ffn", "1.attention")]
    width = compiled().model.config.hidden_size
    centroids = [(1.0,) * width, (-1.0,) * width]
    options = (Option(str(i), p, c) for i, (p, c) in enumerate(zip(plans, centroids, strict=True)))
    found = _under(Choice(tuple(options)), generate(2))
    assert found.prefill.fraction == found.decode.fraction == 0.25


def test_the_last_token_of_a_prompt_may_run_as_in_decode() -> None:
    kept = {SUBLAYERS[0]: Action.KV_ONLY, SUBLAYERS[1]: Action.SKIP}
    plan = SkipPlan(SUBLAYERS, kept, {}, last_token_full=True)
    found = _under(plan, generate(3))
    assert (found.prefill.tokens, found.prefill.fraction) == (len(PROMPT) - 1, 0.5)
    assert (found.decode.tokens, found.decode.fraction) == (3, 0)


def _under(decision: Decision, example: Generate) -> Ran:
    runtime = compiled().runtime
    before, runtime.plan = runtime.plan, decision
    try:
        return ran(compiled().fast, example)
    finally:
        runtime.plan = before


# Where it is not the plan ----------------------------------------------------------------------


def _linking(monkeypatch: pytest.MonkeyPatch, plan: SkipPlan) -> None:
    """Programs are linked for this plan, whatever they are asked for."""
    real = program.rewrite

    def rewrite(outer: Any, sublayers: Any, asked: Any, *rest: Any, **options: Any) -> Any:
        return real(outer, sublayers, plan, *rest, **options)

    monkeypatch.setattr(program, "rewrite", rewrite)


@pytest.mark.breaks
def test_programs_that_run_everything_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    subject: Compiled = compiled()
    _linking(monkeypatch, SkipPlan.empty(SUBLAYERS))
    with subject.using("0.ffn", "1.attention") as fast, pytest.raises(SkipPathError) as caught:
        ran(fast, Recall(PROMPT, encoded("abc")))
    text = str(caught.value)
    assert "runs 2 of 4 sublayers in prefill, but the program that was used runs 4" in text
    assert ": 0.ffn, 1.attention should have been left out. What was measured is not this" in text
    _forget(subject)


@pytest.mark.breaks
def test_a_nearly_right_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    subject: Compiled = compiled()
    _linking(monkeypatch, SkipPlan.of(SUBLAYERS, ["0.ffn", "1.ffn"]))
    with subject.using("0.ffn", "1.attention") as fast, pytest.raises(SkipPathError) as caught:
        ran(fast, Recall(PROMPT, encoded("abc")))
    text = str(caught.value)
    assert "1.attention should have been left out; 1.ffn should have been run." in text
    _forget(subject)


def _forget(subject: Compiled) -> None:
    """No later test gets a program that was linked wrongly."""
    subject.runtime.graphs._programs._programs.clear()


def test_the_right_programs_are_not_refused() -> None:
    plan = SkipPlan.of(SUBLAYERS, ["0.ffn"], decode_extra=["1.ffn"])
    check_followed(plan, "prefill", frozenset(SUBLAYERS) - {SUBLAYERS[1]})
    check_followed(plan, "decode", frozenset(SUBLAYERS) - {SUBLAYERS[1], SUBLAYERS[3]})
    with pytest.raises(SkipPathError, match=r"in decode, .* 1\.ffn should have been left out"):
        check_followed(plan, "decode", frozenset(SUBLAYERS) - {SUBLAYERS[1]})


def test_keys_and_values_alone_are_no_run() -> None:
    attention = SUBLAYERS[0]
    plan = SkipPlan(SUBLAYERS, {attention: "kv_only"}, {})  # type: ignore[dict-item]
    subject = compiled()
    before, subject.runtime.plan = subject.runtime.plan, plan
    try:
        found = ran(subject.fast, generate(3))
    finally:
        subject.runtime.plan = before
    assert counts(found.prefill)["0.attention"] == 0
    assert found.prefill.fraction == 0.25
    assert found.decode.fraction == 0


# The full model, by a plan that changes other steps ---------------------------------------------


def _checked(decision: Decision, *examples: Generate | Recall) -> None:
    runtime = compiled().runtime
    before, runtime.plan = runtime.plan, decision
    try:
        with watched(compiled().fast) as watch:
            assert watch is not None
            for example in examples:
                score(compiled().fast, tokenizer(), example)
        watch.check_measured("a test")
    finally:
        runtime.plan = before


EMPTY = SkipPlan.empty(SUBLAYERS)
DECODING = SkipPlan.of(SUBLAYERS, [], decode_extra=["0.ffn", "1.ffn"])
RECALL = Recall(PROMPT, encoded("abc"))


def test_decisions_that_never_came_to_bear_are_refused() -> None:
    late = Schedule(((0, EMPTY), (3, DECODING)))
    cases: list[tuple[Decision, Generate | Recall, str]] = [
        (DECODING, RECALL, "1 prompts and 0 decode steps"),
        (DECODING, generate(1), "1 prompts and 0 decode steps"),  # the prompt says the first token
        (late, generate(4), "1 prompts and 3 decode steps"),
    ]
    for decision, example, steps in cases:
        with pytest.raises(NotMeasuredError) as caught:
            _checked(decision, example)
        assert f"a test ran {steps}, and nothing was left out in any" in str(caught.value)
        assert "the plan leaves out 0.ffn, 1.ffn in decode. What was" in str(caught.value)
        _checked(decision, generate(5))  # the companion


def test_what_a_choice_did_not_choose_is_not_asked_for() -> None:
    width = compiled().model.config.hidden_size
    runtime = compiled().runtime
    embedding = mean_embedding(runtime.model, torch.tensor([PROMPT])).tolist()
    assert len(embedding) == width
    away = tuple(-v for v in embedding)
    for chosen, other, refused in ((EMPTY, DECODING, False), (DECODING, EMPTY, True)):
        choice = Choice((Option("near", chosen, tuple(embedding)), Option("far", other, away)))
        if refused:
            with pytest.raises(NotMeasuredError, match=r"leaves out 0\.ffn, 1\.ffn in decode"):
                _checked(choice, RECALL)
        else:
            _checked(choice, RECALL)


def test_who_watches_already_goes_on_watching() -> None:
    with watched(compiled().fast) as outer:
        assert outer is not None
        with watched(compiled().fast) as inner:
            assert inner is not None
            score(compiled().fast, tokenizer(), RECALL)
        score(compiled().fast, tokenizer(), RECALL)
    assert inner.read().prefill.steps == 1
    assert outer.read().prefill.steps == 2
    assert compiled().runtime.observer is None


def test_a_model_that_was_not_called_is_refused() -> None:
    with watched(compiled().fast) as watch:
        assert watch is not None
        with pytest.raises(SkipPathError, match="no step of the compiled model was seen"):
            watch.read()


def test_a_model_that_is_not_compiled_is_not_watched() -> None:
    with watched(compiled().model) as watch:
        assert watch is None


def test_windows_that_were_not_there() -> None:
    attention = [s for s in SUBLAYERS if s.kind == "attention"]
    plan = SkipPlan.empty(SUBLAYERS).with_windows(Windows(decode={attention[0]: Window(4)}))
    every = frozenset(SUBLAYERS)
    check_followed(plan, "prefill", every)
    check_followed(plan, "decode", every, frozenset(attention[:1]))
    with pytest.raises(SkipPathError, match=r"has windows in 1 sublayers in decode, but the prog"):
        check_followed(plan, "decode", every)
    with pytest.raises(SkipPathError, match=f"they differ in {attention[0]}"):
        check_followed(plan, "prefill", every, frozenset(attention[:1]))


def test_windows_are_watched() -> None:
    bank = entry("grouped")
    attention = [s for s in bank.sublayers if s.kind == "attention"]
    plan = bank.plan().with_windows(Windows(decode={attention[1]: Window(3)}))
    bank.runtime.plan = plan
    try:
        with watched(bank.compiled) as watch, torch.no_grad():
            assert watch is not None
            cache = bank.runtime.new_cache()
            bank.compiled(bank.tokens(1, 5), past_key_values=cache)
            with pytest.raises(
                NotMeasuredError, match=f"the plan leaves out or narrows {attention[1]} in dec"
            ):
                watch.check_measured("a task")
            bank.compiled(bank.tokens(1, 1), past_key_values=cache)
            watch.check_measured("a task")
            ran = watch.read()
        assert ran.prefill.windowed == {}
        assert ran.decode.windowed == {attention[1]: 1}
        assert ran.to_json()["decode"]["tokens_windowed"] == {str(attention[1]): 1}  # type: ignore[index, call-overload]
    finally:
        bank.runtime.plan = bank.plan()
