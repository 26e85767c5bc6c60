"""What a measurement was taken under, and medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from adaskip_fx.measurement.environment import environment


def conditions() -> dict[str, Any]:
    """Device, threads and versions of this run."""
    return environment(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, least and greatest of repeated measurements."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }
