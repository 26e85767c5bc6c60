"""``fast.adaskip``: small, typed, and checked when a plan is set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

import adaskip_fx
from adaskip_fx.model.handle import Handle, Stats, runtime_of
from adaskip_fx.plans.decisions import PlanChooser, Schedule
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan
from tests.support.compiled_llamas import entry
from tests.support.decisions import EMPTY, SHAPE, SUBLAYERS

PUBLIC = {
    "drafts",
    "explain",
    "kv_heads",
    "free",
    "load_cache",
    "memory_budget",
    "new_cache",
    "plan",
    "policy",
    "profile",
    "stats",
    "sublayers",
    "warmup",
}


def test_it_is_small() -> None:
    handle = entry(SHAPE).compiled.adaskip
    assert {name for name in dir(handle) if not name.startswith("_")} == PUBLIC
    with pytest.raises(AttributeError):
        handle.plans = EMPTY  # a slip of the pen is not swallowed


def test_what_is_set_is_what_is_there() -> None:
    bank = entry(SHAPE)
    handle: Handle = bank.compiled.adaskip
    before = handle.plan
    try:
        for plan in (SkipPlan.of(SUBLAYERS, ["1.ffn"]), Schedule(((0, EMPTY),))):
            handle.plan = plan
            assert handle.plan == plan
            assert handle.plan is handle.plan
            assert handle.new_cache().request.decision == handle.plan
        with pytest.raises(PlanError, match="the plan is for 4 sublayers"):
            handle.plan = SkipPlan.empty(SUBLAYERS[:4])
        assert handle.plan == plan
    finally:
        handle.plan = before


def test_it_counts_and_explains() -> None:
    bank = entry(SHAPE)
    handle: Handle = bank.compiled.adaskip
    cache = handle.new_cache(capacity=16)
    with torch.no_grad():
        bank.compiled(bank.tokens(1, 5), past_key_values=cache)
    stats = handle.stats()
    assert isinstance(stats, Stats)
    assert stats.requests == len(bank.runtime.live_caches()) >= 1
    assert stats.cache_bytes >= cache.nbytes > 0
    assert stats.captures == bank.runtime.counters.captures
    assert set(dataclasses.asdict(stats)) >= {"links", "pieces_compiled", "idle_bytes"}
    assert "requests" in handle.explain()
    assert str(handle).startswith("model")
    assert repr(handle) == f"<adaskip of LlamaForCausalLM, plan {handle.plan.digest[:8]}>"
    del cache
    handle.free()
    assert handle.stats().idle_bytes == 0


def test_the_memory_budget_can_be_set() -> None:
    handle: Handle = entry(SHAPE).compiled.adaskip
    before = handle.memory_budget
    try:
        handle.memory_budget = 2**40
        assert "of at most 1048576.0 MiB: " in handle.explain()
        for wrong in (0, 1e9, "1 GiB"):
            with pytest.raises(ValueError, match="memory_budget must be a whole number of bytes, "):
                handle.memory_budget = wrong  # type: ignore[assignment]
        assert handle.memory_budget == 2**40
        assert runtime_of(entry(SHAPE).compiled).budget.limit == 2**40
    finally:
        handle.memory_budget = before


def test_models_that_were_not_compiled_have_none() -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM is not a model compiled by adaskip_fx"):
        runtime_of(entry(SHAPE).model)
    assert isinstance(entry(SHAPE).compiled, adaskip_fx.CompiledModel)
    assert not isinstance(entry(SHAPE).model, adaskip_fx.CompiledModel)


class First(PlanChooser):
    """Always one of its plans, which a user may change."""

    kind = "first"

    def __init__(self, plans: Sequence[SkipPlan]) -> None:
        self._plans, self.which = tuple(plans), 0

    @property
    def plans(self) -> tuple[SkipPlan, ...]:
        return self._plans

    def with_plans(self, plans: Sequence[SkipPlan]) -> First:
        return First(plans)

    def choose(self, *_: object) -> SkipPlan:
        return self._plans[self.which]


def test_reading_the_plan_changes_nothing() -> None:
    """A chooser of a user's own is the one in force, also after it was looked at."""
    compiled = entry(SHAPE).compiled
    before = compiled.adaskip.plan
    chooser = First((EMPTY, SkipPlan.of(SUBLAYERS, ["1.ffn"])))
    try:
        compiled.adaskip.plan = chooser
        assert str(compiled.adaskip.plan)
        assert runtime_of(compiled).plan is chooser
    finally:
        compiled.adaskip.plan = before
