"""Checks of `worker` in which a plan is searched for and distilled on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import adaskip_fx
from adaskip_fx import SkipPlan
from adaskip_fx.fitting import DistillConfig, Fitter, Recipe, Sample, SurrogateSpec, distill
from adaskip_passes.transforms import differentiable_sums
from tests.distributed.failures import told
from tests.support.recipe_tokenizers import Letters

TEXTS = tuple(f"{word} " * 30 for word in ("alpha", "beta", "gamma", "delta", "eta", "theta"))
_SKIPPED = ("0.attention", "1.ffn", "2.attention")


def fitted(shared: Any) -> Any:
    """The whole recipe on all ranks: the model writes texts, a search, fits, a distillation."""
    model, said = shared.llamas[1], list[str]()
    profile = adaskip_fx.calibrate(model, Letters(), TEXTS[:2], 100)
    recipe = Recipe(synthetic_samples=2, max_length=240, steps=2, shortlist=2)
    plan = adaskip_fx.fit(model, Letters(), {"a": TEXTS}, profile, 1.3, recipe, say=said.append)
    return {
        "plan": plan.digest,
        "skipped": len(plan.prefill),
        "fitted": set(plan.prefill) <= set(plan.surrogates.by_sublayer),
        "said": said,
    }


def distilled(shared: Any) -> Any:
    """A few steps on all ranks, and in one process; and with gradients that are not summed."""
    config = DistillConfig(steps=3, learning_rate=0.02, batch_size=2, eval_interval=1)
    ranks, alone = (Fitter(m, Letters(), TEXTS[:2], max_length=40) for m in shared.llamas[::-1])
    skipping, found = SkipPlan.of(ranks.runtime.sublayers, _SKIPPED), dict[str, Any]()
    for spec in (SurrogateSpec("low_rank", rank=2), SurrogateSpec("linear")):
        plan = ranks.fit(skipping, spec)
        found[spec.kind] = [_losses(fitter, plan, config) for fitter in (ranks, alone)]
    backward = differentiable_sums._Sum.backward
    differentiable_sums._Sum.backward = staticmethod(_not_summed)  # type: ignore[method-assign]
    found["not summed"] = _losses(ranks, plan, config)
    differentiable_sums._Sum.backward = staticmethod(backward)  # type: ignore[method-assign]
    compiled = DistillConfig(steps=1, compiled=True)
    return {**found, "compiled": told(lambda: _losses(ranks, plan, compiled))["text"]}


def _losses(fitter: Fitter, plan: SkipPlan, config: DistillConfig) -> Any:
    samples = [Sample(ids) for ids in fitter.samples]
    moved, log = distill(fitter, plan, [samples], samples, config)
    return {"losses": list(log.losses.values()), "plan": moved.digest}


def _not_summed(_ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return gradient, None


CHECKS: dict[str, Callable[[Any], Any]] = {"fitted": fitted, "distilled": distilled}
