"""Drafts: tokens that are read several at once to be verified, as those of a prompt are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..plans.skip_plan import SkipPlan


@dataclass
class Drafting:
    """Which tokens of a request are decoded ones, however many are read at once.

    Attributes:
        prompt: how many tokens of the text are a prompt's; those after them are decoded.
        seen: how many tokens ``generate`` was handed that were stored before, and need no reading.
        ended: whether the call is over that verifies them; caches may have been exchanged in it.
        plan: what tokens are read with meanwhile that are drafts of the model itself; None for the
            request's own plan.
    """

    prompt: int
    seen: int = 0
    ended: bool = False
    plan: SkipPlan | None = None
