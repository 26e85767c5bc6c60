"""What a compiled model keeps of its drafts, beside its requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from ..plans.skip_plan import SkipPlan
from ..plans.sublayer import Sublayer
from ..plans.surrogates import NO_SURROGATES, Surrogates
from .controller import Controller
from .frontier import weaker_plans
from .options import Lossless
from .refinement import Refine, Refinement, Space
from .statistics import DraftStats


class Speculation:
    """The drafts of one compiled model.

    Attributes:
        decoding: what `compile` was given.
        plan: what drafts of the model itself leave out, unless a proposer has a plan of its own.
        stats: what they have come to.
        controller: who drafts, and how much.
        told: plans that all ranks know by their digests, where there are several.
    """

    def __init__(
        self,
        decoding: Lossless,
        plan: SkipPlan,
        clock: Callable[[], float] = time.perf_counter,
        similarity: Mapping[Sublayer, float] | None = None,
        skippable: Sequence[Sublayer] = (),
        surrogates: Surrogates = NO_SURROGATES,
    ) -> None:
        """Begin with nothing drafted.

        Args:
            decoding: see the class.
            plan: see the class.
            clock: tells seconds.
            similarity: of each sublayer, as far as there is a profile.
            skippable: sublayers that plans may skip which are refined; all of them if ().
            surrogates: what may take their place.
        """
        self.decoding = decoding
        self.plan = plan
        self.stats = DraftStats()
        self.controller = Controller(clock)
        self._similarity = similarity
        self._skippable, self._surrogates = tuple(skippable), surrogates
        self.told: dict[str, SkipPlan] = {}
        self._refinements: dict[tuple[Refine, SkipPlan], Refinement] = {}

    def refinement(self, refine: Refine, plan: SkipPlan) -> Refinement:
        """Return the search for a better plan than `plan`; it is one for all requests."""
        if (refine, plan) not in self._refinements:
            choices = self._skippable or plan.sublayers
            space = Space(plan, choices, self._similarity, self._surrogates)
            self._refinements[refine, plan] = refine.begin(space)
        return self._refinements[refine, plan]

    def frontier(self, plan: SkipPlan, weaker: Sequence[SkipPlan] | None) -> tuple[SkipPlan, ...]:
        """Return a plan and weaker ones: those given, or such as are made of it; see `Skipped`."""
        if weaker is None and self._similarity is not None:
            weaker = weaker_plans(plan, self._similarity)
        return (plan, *(weaker or ()))
