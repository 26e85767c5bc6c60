"""Fits for a search, which asks for many sets of sublayers that differ in one."""

from __future__ import annotations

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import Surrogates

from .fitter import Fitter
from .spec import SurrogateSpec


class SurrogateFitter:
    """What stands in for a set of sublayers, fitted on a fitter's texts: a `FitSurrogates`.

    Where a set is a known one and one sublayer more, the known one is fitted in its order, and what
    is added to it as if it alone were skipped besides, for all candidates at once. Any other set is
    fitted in its order.

    fitter: model and texts. rung: what kind; linear maps if None.
    """

    def __init__(self, fitter: Fitter, rung: SurrogateSpec | None = None) -> None:
        self.fitter = fitter
        self.rung = rung or SurrogateSpec()
        self._known: tuple[Sublayer, ...] | None = None
        self._base = self._beside = Surrogates()

    def __call__(self, skip: tuple[Sublayer, ...], known: tuple[Sublayer, ...] = ()) -> Surrogates:
        """Surrogates for `skip`, in stream order; see `adaskip_fx.policies.FitSurrogates`."""
        more = [s for s in skip if s not in known]
        if len(more) != 1 or len(skip) != len(known) + 1:
            return self._plan(skip).surrogates
        if self._known != known:
            plan = self._plan(known)
            kinds = sorted({s.kind for s in plan.sublayers})
            self._base = plan.surrogates
            self._beside = self.fitter.beside(plan, self.rung, kinds)
            self._known = known
        one = self._beside.by_sublayer[more[0]]
        return self._base.merged(Surrogates({more[0]: one}))

    def _plan(self, skip: tuple[Sublayer, ...]) -> SkipPlan:
        sublayers = self.fitter.runtime.sublayers
        return self.fitter.fit(SkipPlan.of(sublayers, skip), self.rung)
