"""Profiles and decisions as the JSON objects that commands print."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..plans.decisions import Decision
from ..plans.skip_plan import SkipPlan
from ..profiles.head_windows import HeadWindows
from ..profiles.profile import Profile


def profile_json(profile: Profile) -> dict[str, Any]:
    """Return what a profile says: of each sublayer the mean similarity and the scale.

    If windows were measured, of each K/V head what each would change.
    """
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
        **({"windows": _windows_json(profile.windows)} if profile.windows is not None else {}),
    }


def _windows_json(measured: HeadWindows) -> list[dict[str, Any]]:
    return [
        {
            "tokens": window.tokens,
            "sinks": window.sinks,
            "kv_heads": [
                {"sublayer": str(s), "head": head, "dissimilarity": change}
                for (s, head), change in measured.dissimilarity(window).items()
            ],
        }
        for window in measured.windows
    ]


def decision_json(decision: Decision) -> dict[str, Any]:
    """Return a decision with the plan's file content, or that of all of its plans."""
    from ..evaluation.result import decision_json as recorded

    if isinstance(decision, SkipPlan):
        return {"kind": "plan", **recorded(decision)}
    return dict(recorded(decision))
