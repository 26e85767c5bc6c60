"""Drafts of the model itself, with the sublayers left out that the plan leaves out."""

from __future__ import annotations

from dataclasses import dataclass

from ..plans.skip_plan import SkipPlan
from .frontier import check_weaker
from .proposals import Context, Drafts
from .refinement import Refine


@dataclass(frozen=True)
class Skipped:
    """Proposes what the same model decodes under a plan: no weights and no cache of its own.

    Its steps write K/V where those of the full program are written when the drafts are verified.
    Of several with plans of their own the one is asked whose drafts give most tokens for their
    time, as far as was measured: so plans can be tried on the text itself.
    (Self-speculative decoding: Zhang et al. 2024, arXiv 2309.08168; SWIFT, arXiv 2410.06916.)

    Attributes:
        plan: What drafts are decoded with; its decode phase counts. None for what `compile` chose
            by its policy, or was given.
        weaker: Plans that leave out less and less in decode, which take its place within a bound
            (`Bounded`) that it spends too fast. None for some that are made of it, where there is
            a profile: half of its sublayers, a quarter and so on to one, by similarity. () for
            none.
        refine: How the plan is refined while text is written (`Swift`, `KnapSpec`); None: it is
            not.

    Raises:
        ValueError: A plan in `weaker` does not leave out less than the one before it; or there are
            some, and the plan is to be refined.
    """

    plan: SkipPlan | None = None
    weaker: tuple[SkipPlan, ...] | None = None
    refine: Refine | None = None

    def __post_init__(self) -> None:
        if self.weaker and self.refine is not None:
            raise ValueError(
                "weaker plans are of one plan, and refine= puts others in its place; leave one of "
                "the two out"
            )
        if self.weaker is not None:
            object.__setattr__(self, "weaker", tuple(self.weaker))
            plans = (*([self.plan] if self.plan is not None else []), *self.weaker)
            check_weaker(plans)

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
        if self.refine is not None:
            plan = context.refined(plan, self.refine)
        if not plan.decode and not plan.windows.decode:
            return None
        return context.draft(context.due(plan, self.weaker), most)
