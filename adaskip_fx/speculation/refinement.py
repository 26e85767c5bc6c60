"""What it is to refine the plan of drafts while text is written: others are tried on the text.

A candidate is a plan for the same pieces, so it is a link. What it is worth is its matchness: the
share of the last tokens that it would have drafted, each given those before it, which one program
over these tokens measures (SWIFT, arXiv 2410.06916). No token is drafted for it, and none changes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from ..plans.skip_plan import SkipPlan
from ..plans.sublayer import Sublayer
from ..plans.surrogates import NO_SURROGATES, Surrogates
from ..plans.windows import Windows


@dataclass(frozen=True, eq=False)
class Space:
    """The plans that may take a plan's place.

    Attributes:
        plan: what is to be refined.
        skippable: sublayers that may be left out, in stream order.
        similarity: of each sublayer, where there is a profile (``Profile.similarity``); else None.
        surrogates: what takes the place of those that `plan` has none for.
    """

    plan: SkipPlan
    skippable: tuple[Sublayer, ...]
    similarity: Mapping[Sublayer, float] | None = None
    surrogates: Surrogates = NO_SURROGATES

    def skipping(self, chosen: Collection[Sublayer]) -> SkipPlan:
        """Return the plan that skips `chosen`; what attention sees that runs stays as it is."""
        gone, seen = frozenset(chosen), self.plan.windows
        prefill, decode = (
            {s: window for s, window in of_phase.items() if s not in gone}
            for of_phase in (seen.prefill, seen.decode)
        )
        known = self.surrogates.merged(self.plan.surrogates).by_sublayer
        needed = Surrogates({s: c for s, c in known.items() if s in gone})
        windows = Windows(prefill, decode)
        return SkipPlan.of(self.plan.sublayers, gone, surrogates=needed, windows=windows)


class Refinement(Protocol):
    """The search of one model for a better plan, over all of its requests."""

    def plan(self, stored: int) -> SkipPlan:
        """Return the best plan so far, for drafts with `stored` tokens in the cache."""

    def candidate(self) -> SkipPlan | None:
        """Return the plan whose matchness is to be measured next; None where none is."""

    def measured(self, plan: SkipPlan, matchness: float) -> None:
        """Take the matchness of the last candidate, 0 to 1."""


class Refine(Protocol):
    """A way to refine plans. Equal ones are one search."""

    def begin(self, space: Space) -> Refinement:
        """Return a new search."""
