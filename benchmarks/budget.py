"""Budgets of time: the speed-up that a latency table predicts for a plan against the measured one.

For each phase and context, plans that a `LatencyBudget` makes for a few alphas, and plans that
skip sublayers at random. They are timed in rounds of their own, after the table was measured, and
with the full model in every round.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adaskip_fx.latency.table import LatencyTable
from adaskip_fx.measurement.measure import PHASES, measure_plans
from adaskip_fx.measurement.measure import measure as measure_table
from adaskip_fx.measurement.timer import StepTimer
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import Phase, SkipPlan
from adaskip_fx.policies import LatencyBudget
from adaskip_fx.profiles.fingerprint import fingerprint
from adaskip_fx.profiles.profile import Profile

from . import models

ALPHAS = (1.1, 1.25, 4 / 3, 1.5)


def measure(contexts: tuple[int, ...] | None = None, rounds: int | None = None) -> dict[str, Any]:
    """Predicted and measured speed-up of every plan, and by how much the prediction is off.

    Args:
        contexts: prompt lengths, and tokens stored at a decode step; 8,192 and 32,640 on a GPU.
        rounds: how often each plan is timed.
    """
    on_gpu = models.device().type == "cuda"
    contexts = contexts or ((8192, 32640) if on_gpu else (64, 256))
    rounds = rounds or (4 if on_gpu else 9)
    model, compiled = models.pair()
    table = measure_table(compiled, contexts, rounds=rounds)
    profile = _profile(model, table)
    clock = StepTimer(runtime_of(compiled))
    rows = []
    for phase in PHASES:
        for context in contexts:
            plans = _plans(table, profile, phase, context)
            full, *took = measure_plans(
                clock, phase, context, [SkipPlan.empty(table.sublayers), *plans.values()], rounds
            )
            for (name, plan), seconds in zip(plans.items(), took, strict=True):
                row = _row(table, plan, phase, context, full / seconds)
                rows.append({"phase": phase, "context": context, "plan": name, **row})
    return {
        "model": {"layers": len(model.model.layers), "hidden": model.config.hidden_size},
        "dtype": str(model.dtype),
        "rounds": rounds,
        "costs": [
            {"phase": c.phase, "context": c.context, "seconds": dict(c.seconds), "error": c.error}
            for c in table.costs
        ],
        "rows": rows,
        "worst": max(abs(row["error"]) for row in rows),
    }


def _plans(
    table: LatencyTable, profile: Profile, phase: Phase, context: int
) -> dict[str, SkipPlan]:
    budget = LatencyBudget(table, context, phase)
    plans = {}
    for alpha in ALPHAS:
        try:
            plans[f"alpha {alpha:.3g}"] = budget.plan(profile, alpha)
        except ValueError:  # out of reach: the rest takes too much
            continue
    for seed, share in enumerate((8, 12, 16)):
        count = len(table.sublayers) * share // 64
        plans[f"random {count}"] = models.random_plan(table.sublayers, count, seed)
    return plans


def _row(
    table: LatencyTable, plan: SkipPlan, phase: Phase, context: int, measured: float
) -> dict[str, Any]:
    skipped, predicted = plan.skipped(phase), table.predict(plan, phase, context)
    return {
        "attention": sum(s.kind == "attention" for s in skipped),
        "ffn": sum(s.kind == "ffn" for s in skipped),
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
    }


def _profile(model: Any, table: LatencyTable) -> Profile:
    """Similarities at random: what is skipped does not matter here, but how much of each kind."""
    similarity = np.random.default_rng(0).uniform(0.8, 1.0, len(table.sublayers))
    rows = np.array([[c, 1.0, 1.0, 1.0, 1.0] for c in similarity])
    return Profile(table.sublayers, rows[None], fingerprint(model), {}, {})


def summary(result: dict[str, Any]) -> str:
    """The rows as a short table."""
    lines = ["phase   context plan         attn ffn predicted measured   error"]
    for row in result["rows"]:
        lines.append(
            f"{row['phase']:7s} {row['context']:7d} {row['plan']:12s} {row['attention']:4d} "
            f"{row['ffn']:3d} {row['predicted']:9.3f} {row['measured']:8.3f} {row['error']:+7.1%}"
        )
    return "\n".join([*lines, f"worst {result['worst']:.1%}"])
