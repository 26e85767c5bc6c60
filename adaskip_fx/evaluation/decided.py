"""What a compiled model was told to skip, as it is recorded."""

from __future__ import annotations

from adaskip_fx.plans.decisions import Decision
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.utils.files import JSON


def decision_json(decision: Decision) -> dict[str, JSON]:
    """A plan as in its file; of several plans the kind, the digest and all of them."""
    if isinstance(decision, SkipPlan):
        return decision.to_json()
    plans: list[JSON] = [plan.to_json() for plan in decision.plans]
    return {"kind": decision.kind, "digest": decision.digest, "plans": plans}
