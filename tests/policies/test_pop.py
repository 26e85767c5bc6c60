"""Skipping in one phase only: what becomes of a plan, and what the compiled model computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaskip_fx.plans.phase_split import decode_only, prefill_only
from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan
from adaskip_fx.policies import POP, AdaSkip, DecodeOnly, EarlyExit, OnlinePolicy, SkipDecode
from tests.support.compiled_llamas import entry, profile_of
from tests.support.decisions import EMPTY, NAMES, SHAPE, SUBLAYERS, check
from tests.support.profiles import profile

PLAN = SkipPlan.of(SUBLAYERS, ["1.attention", "2.ffn"], decode_extra=["0.ffn"])
SIMILARITY = dict(zip(NAMES, [0.1, 0.9, 0.8, 0.2, 0.3, 0.7], strict=True))


def actions(plan: SkipPlan, phase: str) -> dict[str, str]:
    return {str(s): str(a) for s, a in getattr(plan, phase).items()}


def test_decode_only() -> None:
    plan = decode_only(PLAN)
    assert actions(plan, "prefill") == {}
    assert actions(plan, "decode") == {"0.ffn": "skip", "1.attention": "kv_only", "2.ffn": "skip"}


def test_prefill_only() -> None:
    plan = prefill_only(PLAN)
    assert actions(plan, "prefill") == {"1.attention": "kv_only", "2.ffn": "skip"}
    assert actions(plan, "decode") == {}
    assert plan.last_token_full
    smaller = SkipPlan.of(SUBLAYERS, ["1.attention"])
    both = prefill_only(PLAN, smaller, last_token_full=False)
    assert actions(both, "decode") == {"1.attention": "kv_only"}
    assert both.prefill == plan.prefill
    assert not both.last_token_full


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"0\.attention: left out of decode but not of prompts"):
        prefill_only(PLAN, SkipPlan.of(SUBLAYERS, ["0.attention"]))
    with pytest.raises(PlanError, match="the two plans are for different models"):
        prefill_only(PLAN, SkipPlan.empty(SUBLAYERS[:2]))


def test_the_policy() -> None:
    measured = profile(6)
    plan = POP().plan(measured, 1.5)
    last = EarlyExit().plan(measured, 1.5)
    assert set(plan.prefill) == set(last.prefill)
    assert not plan.decode
    inner = POP(AdaSkip(), decode_alpha=1.2, last_token_full=False)
    entry_profile = profile_of(entry(SHAPE), SIMILARITY)
    found = inner.plan(entry_profile, 2.0)
    assert actions(found, "prefill") == {"0.ffn": "skip", "1.attention": "kv_only", "2.ffn": "skip"}
    assert actions(found, "decode") == {"0.ffn": "skip"}
    assert found.surrogates == AdaSkip().plan(entry_profile, 2.0).surrogates
    assert not isinstance(inner, OnlinePolicy)
    with pytest.raises(PlanError, match="left out of decode but not of prompts"):
        POP(AdaSkip(), decode_alpha=2.0).plan(entry_profile, 1.2)


def test_decode_only_of_any_decision() -> None:
    measured = profile(8)
    plan = DecodeOnly(EarlyExit()).plan(measured, 4 / 3)
    assert plan == decode_only(EarlyExit().plan(measured, 4 / 3))
    schedule = SkipDecode(length=4).plan(measured, 1.2)
    assert DecodeOnly(SkipDecode(length=4)).plan(measured, 1.2) == schedule
    assert DecodeOnly(POP()).plan(measured, 1.5) == SkipPlan.empty(measured.sublayers)


def test_the_first_new_token_comes_from_the_decode_plan() -> None:
    plan = prefill_only(PLAN)
    check(entry(SHAPE), plan, lambda step: plan, (6, 1, 1, 3, 1), keep=1)
    other = replace(plan, last_token_full=False)
    with pytest.raises(AssertionError, match="step 0: relative error"):
        check(entry(SHAPE), plan, lambda step: other, (6, 1), keep=1)


def test_decode_only_has_the_full_models_prompt_and_cache() -> None:
    plan, bank = decode_only(PLAN), entry(SHAPE)
    cache = check(bank, plan, lambda step: plan, (6, 1, 1, 3, 1), keep=0)
    full = check(bank, EMPTY, lambda step: EMPTY, (6, 1, 1, 3, 1), keep=0)
    assert cache.nbytes == full.nbytes
    assert cache.stored == full.stored == (True, True, True)
    skipping = check(bank, PLAN, lambda step: PLAN, (6, 1), keep=0)
    assert skipping.nbytes < full.nbytes


def test_generate_with_the_policy() -> None:
    bank = entry(SHAPE)
    plan = POP(AdaSkip()).plan(profile_of(bank, SIMILARITY), 1.5)
    ids = bank.tokens(1, 7)
    with bank.using(plan), torch.no_grad():
        given = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        result = bank.compiled.generate(ids, **given, return_dict_in_generate=True)
        assert result.past_key_values.get_seq_length() == 9
        assert plan.action("prefill", SUBLAYERS[2]) in (Action.RUN, Action.KV_ONLY)
        bank.oracle.behave(bank.oracle.prefill, {})
        cache = bank.reference_cache()
        bank.oracle.step(ids[:, :-1], cache)
        last = bank.oracle.step(ids[:, -1:], cache)
    assert int(result.sequences[0, 7]) == int(last[0, -1].argmax())
