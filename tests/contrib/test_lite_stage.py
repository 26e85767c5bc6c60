"""LiteStage: budgets by hand, and generation that ends when the model is no longer sure."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import adaskip_fx
from adaskip_fx.contrib.lite_stage import LiteStage, Stage
from adaskip_fx.contrib.stopping import ConfidenceStop
from adaskip_fx.plans.skip_plan import SkipPlan
from tests.support.compiled_llamas import entry, profile_of
from tests.support.decisions import NAMES, SHAPE
from tests.support.profiles import profile

#: Most similar first: 2.ffn, 0.attention, 3.attention, 1.ffn; then ties in stream order.
SIMILAR = {"2.ffn": 0.99, "0.attention": 0.98, "3.attention": 0.97, "1.ffn": 0.96}
RANKING = ["2.ffn", "0.attention", "3.attention", "1.ffn"]


def stage(name: str, seconds: list[float], accuracy: list[float], **more: Any) -> Stage:
    """A stage whose time and accuracy are those of so many sublayers skipped."""

    def of(values: list[float]) -> Any:
        return lambda plan: values[len(plan.skipped("prefill"))]

    return Stage(name, of(seconds), of(accuracy), **more)


def names(plan: SkipPlan) -> set[str]:
    return set(map(str, plan.skipped("prefill")))


def test_budgets_by_hand() -> None:
    plans = LiteStage(
        (
            stage("recall", [4, 3, 2, 1, 0], [0.9, 0.89, 0.87, 0.85, 0.9]),  # 3 breaks the bound
            stage("reason", [4, 3, 5, 2, 6], [0.5, 0.5, 0.5, 0.48, 0.5]),  # 3 is the quickest
            stage("answer", [4, 5, 5, 5, 5], [0.7, 0.7, 0.7, 0.7, 0.7]),  # none is quicker
        )
    ).plans(profile(4, SIMILAR), 2.0)
    assert list(plans) == ["recall", "reason", "answer"]
    assert names(plans["recall"]) == set(RANKING[:2])
    assert names(plans["reason"]) == set(RANKING[:3])
    assert names(plans["answer"]) == set()
    assert not any(plan.surrogates.factors for plan in plans.values())


def test_alpha_is_the_most_and_stride_the_step() -> None:
    faster = stage("one", [9, 8, 7, 6, 5], [1.0] * 5)
    measured = profile(4, SIMILAR)
    assert names(LiteStage((faster,)).plans(measured, 1.333)["one"]) == set(RANKING[:2])
    assert names(LiteStage((faster,), stride=3).plans(measured, 2.0)["one"]) == set(RANKING[:3])
    scaled = LiteStage((faster,), scaled=True).plans(measured, 2.0)["one"]
    assert set(scaled.surrogates.factors.values()) == {0.75}


def test_a_stage_may_have_a_profile_of_its_own() -> None:
    own = profile(4, {"1.attention": 0.9})
    one = stage("one", [2, 1], [1.0, 1.0], profile=own)
    assert names(LiteStage((one,)).plans(profile(4, SIMILAR), 1.15)["one"]) == {"1.attention"}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="LiteStage: no stages were given"):
        LiteStage(())
    twice = (stage("one", [1], [1]), stage("one", [1], [1]))
    with pytest.raises(ValueError, match="LiteStage: two stages have one name"):
        LiteStage(twice)
    with pytest.raises(ValueError, match=re.escape("at least 1, got -0.1 and 1")):
        LiteStage((stage("one", [1], [1]),), bound=-0.1)
    with pytest.raises(ValueError, match=re.escape("got 1.5 and 5")):
        ConfidenceStop(1.5)
    with pytest.raises(ValueError, match="ConfidenceStop needs the scores: call generate with"):
        ConfidenceStop(0.5)(torch.zeros(1, 3, dtype=torch.int64), None)


def test_a_compiled_model_runs_the_stage_that_is_set() -> None:
    bank = entry(SHAPE)
    similarity = dict(zip(NAMES, [0.1, 0.9, 0.8, 0.2, 0.3, 0.7], strict=True))
    stages = (stage("a", [2, 1, 1], [1, 1, 0]), stage("b", [3, 2, 1], [1, 1, 1]))
    plans = LiteStage(stages).plans(profile_of(bank, similarity), 1.5)
    fast = adaskip_fx.compile(bank.model, plan=plans["a"], backend="eager")
    assert names(plans["a"]) == {"0.ffn"}
    assert fast.adaskip.new_cache().stored == (True, True, True)
    fast.adaskip.plan = plans["b"]
    assert names(plans["b"]) == {"0.ffn", "1.attention"}
    assert fast.adaskip.new_cache().stored == (True, False, True)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_generation_ends_when_confidence_falls(ahead: bool) -> None:
    """The same tokens as without, up to where the mean of three falls below the threshold."""
    bank = entry(SHAPE)
    ids = bank.tokens(1, 6)
    options: dict[str, Any] = {
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "attention_mask": torch.ones_like(ids),
    }
    with bank.using():
        free = bank.compiled.generate(ids, max_new_tokens=20, **options)
        sure = [float(scores.softmax(-1).max()) for scores in free.scores]
        means = [sum(sure[i - 2 : i + 1]) / 3 for i in range(2, 20)]
        threshold = min(means[:12]) + 1e-6
        end = next(i for i, mean in enumerate(means) if mean < threshold) + 3
        assert 3 < end <= 14
        stop = ConfidenceStop(threshold, window=3)
        before, bank.runtime.ahead = bank.runtime.ahead, ahead
        try:
            got = bank.compiled.generate(
                ids, max_new_tokens=20, stopping_criteria=[stop], **options
            )
        finally:
            bank.runtime.ahead = before
    assert torch.equal(got.sequences, free.sequences[:, : 6 + end])
    assert got.past_key_values.get_seq_length() == 6 + end - 1


def test_rows_are_stopped_one_by_one() -> None:
    scores = tuple(torch.tensor([[0.0, 9.0], [0.0, 0.0]]) for _ in range(2))
    tokens = torch.tensor([[0, 1, 1], [0, 1, 1]])
    assert ConfidenceStop(0.6, 2)(tokens, scores).tolist() == [False, True]
    assert ConfidenceStop(0.6, 3)(tokens, scores).tolist() == [False, False]
    unlikely = torch.tensor([[0, 1, 0], [0, 1, 1]])
    assert ConfidenceStop(0.6, 2)(unlikely, scores).tolist() == [True, True]
