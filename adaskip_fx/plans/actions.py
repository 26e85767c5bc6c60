"""The phases of a request, and what may happen to a sublayer in each of them."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from adaskip_passes.errors import AdaskipError

Phase = Literal["prefill", "decode"]


class Action(StrEnum):
    """What happens to a sublayer in a phase."""

    RUN = "run"
    SKIP = "skip"
    KV_ONLY = "kv_only"  # K/V (or a mixer's state) is written; the stream is as if it were skipped


class PlanError(AdaskipError, ValueError):
    """A plan that would give wrong answers, or a plan file that cannot be trusted."""
