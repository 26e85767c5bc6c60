"""Plans that are refined while text is written: what is measured of them, and what stays as it is.

What is measured leaves out the last FFN alone, as in `test_bounded`: keys and values are the full
model's then, and the eager model without that FFN says what would have been drafted.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from adaskip_fx.model import drafted, matchness
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.runtime.draft_with import draft_with
from adaskip_fx.speculation.options import Bounded
from adaskip_fx.speculation.skipped import Skipped
from adaskip_fx.speculation.swift import Swift
from tests.support.compiled_llamas import stored
from tests.support.drafts import Drafting, drafting
from tests.support.eager_reference import Oracle

PROMPT, NEW, WINDOW = 9, 30, 8


def options(model: Drafting, rows: int) -> tuple[torch.Tensor, dict[str, Any]]:
    ids = model.tokens(rows, PROMPT, 4)
    given: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return ids, {**given, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}


def refined(model: Drafting, rows: int = 2, steps: int = 100) -> Any:
    """What is generated while plans are tried in every round."""
    swift = Swift(1.0, steps, every=2)
    plan = SkipPlan.of(model.runtime.sublayers, ["1.ffn"])
    speculation = model.begin(Skipped(plan, refine=swift), longest=WINDOW - 1)
    ids, given = options(model, rows)
    output = model.fast.generate(ids, **given)
    search: Any = speculation.refinement(swift, plan)
    return output, search


def assert_as_without(model: Drafting) -> int:
    """The text and the cache are the full model's; returns how many plans were tried."""
    ids, given = options(model, 2)
    want = model.model.generate(ids, **given)
    output, search = refined(model)
    assert torch.equal(output.sequences, want.sequences)
    for pair, layer in zip(
        stored(output.past_key_values), want.past_key_values.layers, strict=True
    ):
        assert pair is not None
        for mine, theirs in zip(pair, (layer.keys, layer.values), strict=True):
            length = mine.shape[2]
            torch.testing.assert_close(mine, theirs[:, :, :length], rtol=1e-10, atol=1e-10)
    tried: int = search.tried
    return tried


@pytest.mark.parametrize("static", [False, True])
def test_plans_that_are_tried_change_nothing(static: bool) -> None:
    assert assert_as_without(drafting(static=static)) > 3


@pytest.mark.breaks
def test_keys_that_are_not_put_back_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""

    @contextmanager
    def overwrites(cache: Any, tokens: int) -> Any:
        length = cache.length
        cache.keep_first(length - tokens)
        yield
        cache.length = length

    monkeypatch.setattr(matchness, "read_again", overwrites)
    with pytest.raises(AssertionError):
        assert_as_without(drafting())


@torch.no_grad()
def test_matchness_is_the_share_of_tokens_that_would_have_been_drafted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, seen = drafting(), list[tuple[torch.Tensor, float]]()
    measure = drafted.matchness

    def watched(request: Any, plan: SkipPlan, tokens: int) -> float:
        seen.append((request.input_ids.clone(), measure(request, plan, tokens)))
        return seen[-1][1]

    monkeypatch.setattr(drafted, "matchness", watched)
    with caplog.at_level(logging.DEBUG, "adaskip_fx.model"):
        refined(model, steps=1)
    (text, share), oracle = seen[0], Oracle(model.model)
    oracle.behave(*([{"1.ffn": "skip"}] * 2), {})
    try:
        choice = oracle.model(text).logits.argmax(-1)[:, -WINDOW - 1 : -1]
    finally:
        oracle.behave({})
    same = choice == text[:, -WINDOW:]
    assert share == pytest.approx(same.double().mean().item())
    assert 0 < share < 1
    assert f"would have drafted {share:.2f} of the text" in caplog.text


def test_rows_that_begin_with_padding_are_not_measured() -> None:
    model, swift = drafting(), Swift(1.0)
    plan = SkipPlan.of(model.runtime.sublayers, ["1.ffn"])
    speculation = model.begin(Skipped(plan, refine=swift), longest=3)
    ids, given = options(model, 2)
    given["attention_mask"][1, :3] = 0
    want = model.model.generate(ids, **given)
    assert torch.equal(model.fast.generate(ids, **given).sequences, want.sequences)
    search: Any = speculation.refinement(swift, plan)
    assert search.tried == 0


def test_what_nobody_verifies_is_not_refined() -> None:
    runtime = drafting().runtime
    before, plan = runtime.plan, SkipPlan.of(runtime.sublayers, ["1.ffn"])
    with pytest.raises(ValueError, match="refine= tries plans that write none"):
        draft_with(runtime, Bounded((Skipped(plan, refine=Swift()),), verify_share=0.5))
    assert runtime.plan is before, "what is refused has changed nothing"
