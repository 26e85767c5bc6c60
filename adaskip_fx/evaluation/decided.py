"""What a compiled model was told to skip: read from a path, and as it is recorded."""

from __future__ import annotations

from pathlib import Path

from adaskip_fx.decision_files import load
from adaskip_fx.decisions import Decision
from adaskip_fx.files import JSON
from adaskip_fx.plan import SkipPlan


def load_decision(path: Path) -> Decision:
    """A plan's file, or the folder of a schedule, a choice or a plan per stage.

    Raises:
        PlanError: says which file, what is wrong with it and what to do.
    """
    return load(path) if path.is_dir() else SkipPlan.load(path)


def decision_json(decision: Decision) -> dict[str, JSON]:
    """A plan as in its file; of several plans the kind, the digest and all of them."""
    if isinstance(decision, SkipPlan):
        return decision.to_json()
    plans: list[JSON] = [plan.to_json() for plan in decision.plans]
    return {"kind": decision.kind, "digest": decision.digest, "plans": plans}
