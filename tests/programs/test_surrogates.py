"""Every rung of the surrogates in the programs that run it, against the eager model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaskip_fx.api import build
from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan
from adaskip_fx.plans.surrogate import SHAPES, Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.testing import assert_equivalent, plans
from tests.support.compiled_llamas import entry, fewer, make_model
from tests.support.surrogates import surrogate

MODELS = {name: make_model(name) for name in ("three_layers", "grouped")}
#: Another one takes captures of its own.
DRAWN = tuple(MODELS)[: 2 if settings().max_examples > 20 else 1]


@fewer(4)
@given(st.data(), st.sampled_from(DRAWN))
def test_any_plan_with_any_surrogates(data: Any, name: str) -> None:
    model = MODELS[name]
    assert_equivalent(model, data.draw(plans(model)), decode_steps=3)


def ladder(kind: Any, hidden: int, *, rank: int = 3) -> SkipPlan:
    """Two neighbours and one apart, of which one writes its K/V."""
    sublayers = entry("three_layers").sublayers
    actions = dict(zip(sublayers[1:3], (Action.SKIP, Action.SKIP), strict=True))
    actions[sublayers[4]] = Action.KV_ONLY
    surrogates = {s: _small(surrogate(kind, i, hidden, rank)) for i, s in enumerate(actions)}
    return SkipPlan(sublayers, actions, actions, Surrogates(surrogates))


def _small(given: Surrogate) -> Surrogate:
    """So that the model's own numbers still count."""
    if "factor" in given.tensors:
        return given
    return Surrogate(given.kind, {n: t / 10 for n, t in given.tensors.items()})


@pytest.mark.parametrize(
    "kind",
    [
        k if k in ("scale", "normalized") else pytest.param(k, marks=pytest.mark.slow)
        for k in SHAPES
    ],
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_each_kind_in_each_dtype(kind: str, dtype: torch.dtype) -> None:
    plan = ladder(kind, 32)
    assert_equivalent(MODELS["three_layers"], plan, dtype=dtype)
    near = {s: ladder(kind, 32).surrogates.get(s) for s in plan.prefill}
    first = next(iter(near))
    near[first] = surrogate(kind, 7, 32)  # type: ignore[arg-type]  # another one
    other = plan.with_surrogates(Surrogates({s: c for s, c in near.items() if c}))
    bank, found = entry("three_layers"), []
    for each in (plan, other):
        with bank.using(each) as compiled, torch.no_grad():
            found.append(compiled(input_ids=torch.arange(9)[None]).logits)
    assert not torch.allclose(*found, rtol=1e-3)  # companion: the tensors matter


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("diagonal", "linear", "low_rank")),
        "normalized",
    ],
)
def test_decode_at_static_cache_and_fused_link_agree(kind: str) -> None:
    model, plan = MODELS["three_layers"], ladder(kind, 32)
    ids = torch.arange(11)[None]
    results = []
    for options in ({}, {"static_cache": True}, {"link": "fused"}):
        compiled = build(model, plan, backend="eager", **options)
        results.append(compiled.generate(ids, max_new_tokens=6, do_sample=False))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_new_surrogate_compiles_nothing() -> None:
    model = entry("three_layers")
    with model.using(ladder("low_rank", 32)) as compiled, torch.no_grad():
        compiled(input_ids=torch.arange(9)[None])
        before = model.runtime.counters.captures, model.runtime.pieces_compiled
        for seed in (1, 2):
            other = {s: surrogate("low_rank", seed, 32, 3) for s in ladder("low_rank", 32).prefill}
            model.runtime.plan = ladder("low_rank", 32).with_surrogates(Surrogates(other))
            compiled(input_ids=torch.arange(9)[None])
        assert (model.runtime.counters.captures, model.runtime.pieces_compiled) == before


def test_surrogates_of_another_width_are_refused() -> None:
    model = entry("three_layers")
    wide = r"1\.attention: its linear surrogate is for a stream of width 16, but that of Llama"
    with pytest.raises(
        PlanError, match=r"0\.ffn: its linear surrogate is for a stream of width 16"
    ):
        build(model.model, ladder("linear", 16), backend="eager")
    other = SkipPlan.of(
        model.sublayers,
        ["1.attention"],
        surrogates=Surrogates({model.sublayers[2]: surrogate("linear", 0, 16)}),
    )
    with pytest.raises(PlanError, match=wide):
        model.runtime.new_cache(plan=other)
    model.runtime.new_cache(plan=ladder("linear", 32))  # near miss
