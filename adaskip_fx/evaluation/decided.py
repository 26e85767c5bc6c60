"""What a compiled model was told to skip, as it is recorded."""

from __future__ import annotations

from adaskip_fx.decisions import Decision
from adaskip_fx.files import JSON
from adaskip_fx.plan import SkipPlan


def decision_json(decision: Decision) -> dict[str, JSON]:
    """A plan as in its file; of several plans the kind, the digest and all of them."""
    if isinstance(decision, SkipPlan):
        return decision.to_json()
    plans: list[JSON] = [plan.to_json() for plan in decision.plans]
    return {"kind": decision.kind, "digest": decision.digest, "plans": plans}
