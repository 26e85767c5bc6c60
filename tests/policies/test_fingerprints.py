"""Every policy's plans say which model they are for: the one that the profile was measured on."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from adaskip_fx import SkipPlan, policies
from adaskip_fx.contrib.lite_stage import LiteStage, Stage
from adaskip_fx.contrib.routing import Router
from adaskip_fx.plans.decisions import plans_of
from adaskip_fx.policies import D3, POP, AdaSkip, DecodeOnly, EarlyExit, LLMDrop
from tests.support.profiles import profile

MADE: dict[str, Any] = {
    "adaskip": AdaSkip(),
    "early exit": EarlyExit(),
    "llm drop": LLMDrop(),
    "pop": POP(),
    "a schedule": D3(),
    "decode only": DecodeOnly(),
}
MEASURED = profile(12, {"1.ffn": 0.9, "2.attention": 0.8, "3.ffn": 0.7})


@pytest.mark.parametrize("name", MADE)
def test_a_plan_of_a_profile(name: str, tmp_path: Path) -> None:
    decision = MADE[name].plan(MEASURED, 1.25)
    assert all(plan.fingerprint == MEASURED.fingerprint for plan in plans_of(decision))
    if isinstance(decision, SkipPlan):
        decision.save(tmp_path / "plan.json")
        assert SkipPlan.load(tmp_path / "plan.json").fingerprint == MEASURED.fingerprint


def test_a_plan_of_each_stage() -> None:
    stage = Stage("answer", lambda plan: -len(plan.prefill), lambda plan: 1.0)
    (plan,) = LiteStage((stage,)).plans(MEASURED, 1.5).values()
    assert plan.prefill
    assert plan.fingerprint == MEASURED.fingerprint


def test_no_policy_is_without() -> None:
    """Those that need a model or a table to judge by are asked whether they are wrapped alike."""
    found = [getattr(policies, name) for name in policies.__all__]
    kinds = [k for k in found if not getattr(k, "_is_protocol", False) and hasattr(k, "plan")]
    assert len(kinds) > 12
    for kind in (*kinds, Router):
        assert inspect.unwrap(kind.plan) is not kind.plan, kind.__name__
