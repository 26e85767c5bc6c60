"""Surrogate fits for a search, which asks for many sets of sublayers that differ in one."""

from __future__ import annotations

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import Surrogates

from .fitter import Fitter
from .spec import SurrogateSpec


class SurrogateFitter:
    """Fits surrogates for sets of sublayers on a fitter's texts: a `FitSurrogates`.

    Where a set is a known one and one sublayer more, the known one is fitted in its order, and what
    is added to it as if it alone were skipped besides, for all candidates at once. Any other set is
    fitted in its order.

    Attributes:
        fitter: the model and the texts.
        spec: what kind of surrogate to fit; linear maps by default.
    """

    def __init__(self, fitter: Fitter, spec: SurrogateSpec | None = None) -> None:
        self.fitter = fitter
        self.spec = spec or SurrogateSpec()
        self._known: tuple[Sublayer, ...] | None = None
        self._of_known = self._of_others = Surrogates()

    def __call__(self, skip: tuple[Sublayer, ...], known: tuple[Sublayer, ...] = ()) -> Surrogates:
        """Return surrogates for `skip`; see `adaskip_fx.policies.FitSurrogates`."""
        more = [s for s in skip if s not in known]
        if len(more) != 1 or len(skip) != len(known) + 1:
            return self._fit(skip).surrogates
        if self._known != known:
            plan = self._fit(known)
            kinds = sorted({s.kind for s in plan.sublayers})
            self._of_known = plan.surrogates
            self._of_others = self.fitter.fit_running(plan, self.spec, kinds)
            self._known = known
        added = {more[0]: self._of_others.by_sublayer[more[0]]}
        return self._of_known.merged(Surrogates(added))

    def _fit(self, skip: tuple[Sublayer, ...]) -> SkipPlan:
        sublayers = self.fitter.runtime.sublayers
        return self.fitter.fit(SkipPlan.of(sublayers, skip), self.spec)
