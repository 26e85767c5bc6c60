"""Drafts of the model itself, with the sublayers left out that the plan leaves out."""

from __future__ import annotations

from dataclasses import dataclass

from ..plans.skip_plan import SkipPlan
from .proposals import Context, Drafts


@dataclass(frozen=True)
class Skipped:
    """Proposes what the same model decodes under a plan: no weights and no cache of its own.

    Its steps write K/V where those of the full program are written when the drafts are verified.
    (Self-speculative decoding: Zhang et al. 2024, arXiv 2309.08168; SWIFT, arXiv 2410.06916.)

    Attributes:
        plan: What drafts are decoded with; its decode phase counts. None for what `compile` chose
            by its policy, or was given.
    """

    plan: SkipPlan | None = None

    @property
    def name(self) -> str:
        """What statistics call it."""
        return "skipped"

    @property
    def free(self) -> bool:
        """A draft is a step of the model."""
        return False

    def begin(self) -> Skipped:
        """Return what proposes for a new request: it remembers nothing."""
        return self

    def propose(self, context: Context, most: int) -> Drafts | None:
        """Return `most` tokens; None where nothing is left out, or too little is stored."""
        plan = self.plan if self.plan is not None else context.plan
        if not plan.decode and not plan.windows.decode:
            return None
        return context.draft(plan, most)
