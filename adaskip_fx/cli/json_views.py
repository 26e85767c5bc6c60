"""Profiles and decisions as the JSON objects that commands print."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..plans.decisions import Decision
from ..plans.skip_plan import SkipPlan
from ..profiles.profile import Profile


def profile_json(profile: Profile) -> dict[str, Any]:
    """Return what a profile says: of each sublayer the mean similarity and the scale."""
    rows = zip(profile.sublayers, profile.similarity(), profile.scale(), strict=True)
    return {
        "kind": "profile",
        "digest": profile.digest,
        "tokens": profile.tokens,
        "model": asdict(profile.fingerprint),
        "calibration": dict(profile.calibration),
        "versions": dict(profile.versions),
        "sublayers": [
            {"sublayer": str(s), "similarity": float(similarity), "scale": float(scale)}
            for s, similarity, scale in rows
        ],
    }


def decision_json(decision: Decision) -> dict[str, Any]:
    """Return a decision with the plan's file content, or that of all of its plans."""
    from ..evaluation.result import decision_json as recorded

    if isinstance(decision, SkipPlan):
        return {"kind": "plan", **recorded(decision)}
    return dict(recorded(decision))
