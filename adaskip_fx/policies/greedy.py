"""Greedy removal by loss (BlockPruner 2406.10594, FinerCut 2405.18218, SLEB 2402.09025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaskip_fx.policies.adaskip import skip_count
from adaskip_fx.policies.base import for_its_model
from adaskip_fx.policies.candidates import Evaluator, FitSurrogates, candidate, skippable

if TYPE_CHECKING:
    from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class Greedy:
    """Remove sublayers one by one, each time the one whose removal leaves the least loss.

    Attributes:
        evaluator: judges candidate plans.
        fit_surrogates: fits surrogates for a set of sublayers; called for every candidate, so that
            each is judged with surrogates that were fitted for it.
        scaled: without `fit_surrogates`, whether a skipped sublayer becomes AdaSkip's `scale * x`
            (eq. 4) instead of `x`.
        protected: whether the first two layers and the last always run.
        never: other sublayers that always run.
        shortlist: how many of the remaining sublayers are tried at each step, the most similar
            ones; None for all.
        samples: how many samples the evaluator judges on; None for all.

    Raises:
        ValueError: a shortlist below 1.
    """

    evaluator: Evaluator
    fit_surrogates: FitSurrogates | None = None
    scaled: bool = False
    protected: bool = False
    never: frozenset[Sublayer] = frozenset()
    shortlist: int | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.shortlist is not None and self.shortlist < 1:
            raise ValueError(f"Greedy: shortlist must be at least 1, got {self.shortlist!r}")

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return a plan that skips `skip_count(alpha, S)` sublayers.

        Of two removals with the same loss, that of the more similar sublayer is taken.

        Raises:
            ValueError: `skip_count` refuses `alpha`, or too few sublayers may be skipped.
        """
        return self.plans(profile, alpha)[-1]

    def plans(self, profile: Profile, alpha: float) -> tuple[SkipPlan, ...]:
        """Return the plan after each removal, from none to as many as `alpha` says.

        Raises:
            ValueError: as for `plan`.
        """
        count = skip_count(alpha, len(profile.sublayers))
        free = skippable(profile, self.protected, self.never, count, "Greedy")
        similarity = dict(zip(profile.sublayers, profile.similarity().tolist(), strict=True))
        ranking = sorted(free, key=lambda s: -similarity[s])
        found = [candidate(profile, (), None, False)]
        for _ in range(count):
            gone = found[-1].skipped("prefill")
            left = [s for s in ranking if s not in gone][: self.shortlist]
            plans = [self._candidate(profile, gone, s) for s in left]
            found.append(min(plans, key=lambda p: self.evaluator(p, self.samples)))
        return tuple(found)

    def _candidate(
        self, profile: Profile, gone: tuple[Sublayer, ...], another: Sublayer
    ) -> SkipPlan:
        return candidate(profile, (*gone, another), self.fit_surrogates, self.scaled, gone)
