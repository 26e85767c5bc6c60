"""Profiles with planted similarities."""

from __future__ import annotations

from typing import Any

import numpy as np

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.profiles.profile import Fingerprint, Profile, fingerprint

TOY = Fingerprint("0" * 16, "toy", 1, "0" * 16)
KINDS = ("attention", "ffn")


def profile(layers: int, similarity: dict[str, float] | None = None, model: Any = None) -> Profile:
    """Every sublayer is half like its input unless `similarity` says more; ratios of 0.75.

    Of `model`, or of none that there is.
    """
    about = fingerprint(model) if model is not None else TOY
    known = similarity or {}
    names = [f"{i}.{kind}" for i in range(layers) for kind in KINDS]
    rows = [(4 * known.get(name, 0.5), 4 * 0.75, 4.0, 4 * 0.75**2, 4) for name in names]
    sublayers = tuple(map(Sublayer.parse, names))
    return Profile(sublayers, np.array([rows]), about, {}, {})


def layers_of(plan: SkipPlan) -> list[int]:
    """The layers that are skipped; each is skipped whole, in both phases."""
    skipped = plan.skipped("prefill")
    assert plan.skipped("decode") == skipped
    layers = sorted({s.layer for s in skipped})
    assert [str(s) for s in skipped] == [f"{i}.{kind}" for i in layers for kind in KINDS]
    return layers
