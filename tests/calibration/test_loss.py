"""`CalibrationLoss`: what it says of a plan against the oracle's logits, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import adaskip_fx
from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.plans.phase_split import decode_only, prefill_only
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan
from adaskip_fx.policies import AdaSkip
from tests.support.compiled_llamas import Entry, entry, profile_of
from tests.support.decisions import SHAPE, Reference

BANK = entry(SHAPE)
PLAN = BANK.plan(["1.attention", "2.ffn"], factors={"2.ffn": 0.8})
LESS = BANK.plan(["2.ffn"])
TEXTS = [BANK.tokens(1, count, count) for count in (40, 300, 9)]
ANSWERS = [(BANK.tokens(1, 12, 5), BANK.tokens(1, 3, 6)), (BANK.tokens(1, 7, 7), TEXTS[2][:, :1])]


@pytest.fixture(scope="module")
def loss() -> CalibrationLoss:
    return CalibrationLoss(BANK.compiled, TEXTS, ANSWERS, text_weight=2.0, answer_weight=0.5)


def log_probabilities(bank: Entry, plan: SkipPlan, *steps: torch.Tensor) -> torch.Tensor:
    """[T, V] in float64, of steps one after the other."""
    reference = Reference(bank, lambda step: plan)
    logits = torch.cat([reference.step(ids) for ids in steps], 1)[0]
    bank.oracle.behave({})
    return logits.double().log_softmax(-1)


def divergence(plan: SkipPlan, ids: torch.Tensor) -> float:
    full = log_probabilities(BANK, SkipPlan.empty(BANK.sublayers), ids)
    other = log_probabilities(BANK, plan, ids)
    return float((full.exp() * (full - other)).sum(-1).mean())


def surprise(plan: SkipPlan, prompt: torch.Tensor, answer: torch.Tensor, decoded: bool) -> float:
    rest = answer[:, :-1]
    steps = [prompt, *rest.split(1, 1)] if decoded else [torch.cat((prompt, rest), 1)]
    found = log_probabilities(BANK, plan, *[s for s in steps if s.numel()])[-answer.shape[1] :]
    return -sum(float(found[i, token]) for i, token in enumerate(answer[0])) / answer.shape[1]


@pytest.mark.parametrize("plan", [PLAN, LESS])
def test_the_loss_is_the_oracles(loss: CalibrationLoss, plan: SkipPlan) -> None:
    texts = [divergence(plan, ids) for ids in TEXTS]
    answers = [surprise(plan, *pair, decoded=False) for pair in ANSWERS]
    assert loss.text_loss(plan) == pytest.approx(sum(texts) / 3, rel=1e-3)
    assert loss.answer_loss(plan) == pytest.approx(sum(answers) / 2, rel=1e-5)
    assert loss(plan) == pytest.approx(2 * sum(texts) / 3 + 0.5 * sum(answers) / 2, rel=1e-3)
    assert loss(plan, samples=1) == pytest.approx(2 * texts[0] + 0.5 * answers[0], rel=1e-3)
    assert min(texts) > 1e-3, "the plan matters"


def test_the_companion_another_plan_has_another_loss(loss: CalibrationLoss) -> None:
    assert loss.text_loss(PLAN) != pytest.approx(divergence(LESS, TEXTS[0]), rel=0.05)
    assert loss.answer_loss(PLAN) != pytest.approx(loss.answer_loss(LESS), rel=0.01)


def test_the_full_model_is_as_it_was(loss: CalibrationLoss) -> None:
    assert loss.text_loss(SkipPlan.empty(BANK.sublayers)) == pytest.approx(0, abs=1e-5)


def test_phases_that_differ_are_decoded(loss: CalibrationLoss) -> None:
    prompt_only, late = prefill_only(PLAN), decode_only(PLAN)
    for plan in (prompt_only, late):
        answers = [surprise(plan, *pair, decoded=True) for pair in ANSWERS]
        assert loss.answer_loss(plan) == pytest.approx(sum(answers) / 2, rel=1e-4)
    assert loss.text_loss(late) == pytest.approx(0, abs=1e-5), "prompts run in full"


def test_answers_against_the_full_model() -> None:
    """The divergence of the answer's tokens alone, decoded or not; likelihoods do not matter."""
    loss = CalibrationLoss(BANK.compiled, (), ANSWERS, answer_divergence=True)
    empty = SkipPlan.empty(BANK.sublayers)
    assert loss(empty) == pytest.approx(0, abs=1e-5)
    for plan, decoded in ((PLAN, False), (prefill_only(PLAN), True)):
        total = 0.0
        for prompt, answer in ANSWERS:
            rest = answer[:, :-1]
            steps = [prompt, *rest.split(1, 1)] if decoded else [torch.cat((prompt, rest), 1)]
            steps = [ids for ids in steps if ids.numel()]
            full, other = (log_probabilities(BANK, p, *steps) for p in (empty, plan))
            both = zip(full[-answer.shape[1] :], other[-answer.shape[1] :], strict=True)
            total += sum(float((f.exp() * (f - o)).sum()) for f, o in both) / answer.shape[1]
        assert loss(plan) == pytest.approx(total / 2, rel=1e-3)
        assert total > 1e-3, "the plan matters"


def test_what_does_not_fit_is_computed_anew(loss: CalibrationLoss) -> None:
    size = 2 * BANK.model.config.vocab_size
    for fits, kept in ((0, 0), (size * 41, 1), (2**30, 3)):
        small = CalibrationLoss(BANK.compiled, TEXTS, memory=fits)
        assert len(small._kept) == kept
        assert small.text_loss(PLAN) == pytest.approx(loss.text_loss(PLAN), rel=1e-3)


def test_a_plan_is_judged_once_and_costs_no_capture() -> None:
    fresh = CalibrationLoss(BANK.compiled, TEXTS[:1])
    captures, links = BANK.runtime.counters.captures, BANK.runtime.counters.links
    for plan in (PLAN, LESS, PLAN, BANK.plan(["0.ffn"])):
        fresh(plan)
    assert fresh.judged == 3
    assert BANK.runtime.counters.captures == captures
    assert BANK.runtime.counters.links <= links + 3


def test_nothing_is_learned_while_it_judges() -> None:
    """Also on a model whose own requests learn from their first token."""
    similarity = {str(s): 0.5 for s in BANK.sublayers}
    plan = decode_only(PLAN)
    with BANK.using(PLAN, AdaSkip(window=1), profile_of(BANK, similarity)):
        learning = CalibrationLoss(BANK.compiled, answers=ANSWERS)
        assert learning.answer_loss(plan) == pytest.approx(
            sum(surprise(plan, *pair, decoded=True) for pair in ANSWERS) / 2, rel=1e-4
        )


class Words:
    """A tokenizer of one token a letter; special tokens are a 1 before the text."""

    def __call__(self, text: str, **given: Any) -> dict[str, torch.Tensor]:
        begin = [1] if given.get("add_special_tokens", True) else []
        codes = [*begin, *(3 + ord(letter) % 50 for letter in text)][: given["max_length"]]
        return {"input_ids": torch.tensor([codes], dtype=torch.int64)}


def test_of_text() -> None:
    loss = CalibrationLoss.of(BANK.compiled, Words(), ["abcdef"], [("ab", "cd")], max_length=5)
    assert [t.shape for t in loss._texts] == [(1, 5)]
    ((prompt, answer),) = loss._answers
    assert prompt[0, 0] == 1
    assert answer.tolist() == [[3 + ord("c") % 50, 3 + ord("d") % 50]]


def test_a_loss_that_is_no_number_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = CalibrationLoss(BANK.compiled, TEXTS[:1])
    monkeypatch.setattr(loss, "text_loss", lambda *given: math.nan)
    assert loss(PLAN) == math.inf


def test_refusals() -> None:
    with pytest.raises(ValueError, match="a loss needs texts or answers to be measured on"):
        CalibrationLoss(BANK.compiled)
    with pytest.raises(ValueError, match=r"text 1 has shape \[1, 1\]; expected \[1, tokens\], at"):
        CalibrationLoss(BANK.compiled, [TEXTS[0], TEXTS[0][:, :1]])
    with pytest.raises(ValueError, match="answer 0 has shape"):
        CalibrationLoss(BANK.compiled, answers=[(TEXTS[0], TEXTS[0][:, :0])])
    loss = CalibrationLoss(BANK.compiled, TEXTS[:1])
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        loss(PLAN, 0)
    with pytest.raises(PlanError):
        loss(SkipPlan.empty(BANK.sublayers[:2]))


@pytest.mark.slow
def test_a_model_that_is_not_compiled_is() -> None:
    loss = CalibrationLoss(BANK.model, TEXTS[:1], backend="eager")
    expected = CalibrationLoss(BANK.compiled, TEXTS[:1])
    assert loss(PLAN) == pytest.approx(expected(PLAN), rel=1e-4)
    assert adaskip_fx.SkipPlan is SkipPlan
