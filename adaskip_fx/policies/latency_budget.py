"""AdaSkip with a budget of measured time: meet a speed-up, and lose as little as that allows.

The paper counts sublayers as if all cost the same. Here each saves its measured cost less that of
its surrogate, and a knapsack takes the sublayers whose summed loss is the least.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from adaskip_fx.latency.knapsack import choose
from adaskip_fx.latency.table import LatencyTable
from adaskip_fx.latency.terms import Weights, goals_of, named, surrogate_term
from adaskip_fx.plans.compose_surrogates import compose_surrogates
from adaskip_fx.plans.skip_plan import Phase, SkipPlan, Sublayer
from adaskip_fx.policies.adaskip import AdaSkip
from adaskip_fx.policies.base import for_its_model

if TYPE_CHECKING:
    from adaskip_fx.profiles.profile import Profile

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LatencyBudget:
    """Choose the sublayers to skip so that the predicted speed-up is at least alpha.

    Attributes:
        table: what sublayers cost.
        context: tokens of a prompt, and tokens stored at a decode step, for which the speed-up is
            predicted.
        phase: what is to be faster: `"both"` phases, each by alpha; one of them; or the time of
            whole requests, by how often each phase counts (`{"prefill": 1, "decode": 200}`).
        losses: what is lost by skipping each sublayer, in any unit; 1 - similarity if None.
        base: gives the similarities, the scales, and the online step of decode, which comes
            besides and is not counted.

    Raises:
        ValueError: an unknown phase.
    """

    table: LatencyTable
    context: int
    phase: Weights | Literal["both"] = "both"
    losses: Mapping[Sublayer, float] | None = None
    base: AdaSkip = field(default_factory=AdaSkip)

    def __post_init__(self) -> None:
        goals_of(self.phase)
        if self.losses is not None:
            object.__setattr__(self, "losses", MappingProxyType(dict(self.losses)))

    def check(self, model: Any) -> None:
        """Refuse a model, a dtype or a device that the table was not measured on.

        A table whose measured times do not add up is accepted with a warning.

        Raises:
            TableError: the message says what differs and what to do.
        """
        self.table.check(model)
        if self.table.warning:
            warnings.warn(self.table.warning, stacklevel=7)  # the caller of `compile`

    def describe(self, plan: SkipPlan) -> str:
        """Return a line with the speed-up that is predicted for a plan, by phase."""
        by_phase = self.table.speed_ups(plan, "both", self.context)
        speed_ups = (f"{phase} {speed_up:.3g}x" for phase, speed_up in by_phase.items())
        return f"budget: {', '.join(speed_ups)} predicted at {self.context:,} tokens"

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return the plan of least summed loss that is `alpha` times as fast by the table.

        Raises:
            ValueError: `alpha` is not a number of at least 1, or cannot be reached; or profile and
                table are of different models.
        """
        if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 1 <= alpha < math.inf:
            raise ValueError(
                f"alpha, the speed-up, must be a number of at least 1 (skip nothing); got {alpha!r}"
            )
        full = SkipPlan.empty(profile.sublayers)
        before = self._seconds(full)  # refuses a profile of another model
        losses, savings = self._losses(profile), self._savings(profile)
        items = [i for i, name in enumerate(self.table.classes) if name]
        try:
            chosen = choose(
                [losses[i] for i in items],
                savings[items],
                [seconds * (1 - 1 / float(alpha)) for seconds in before],
                leave_one=len(items) == len(losses),
            )
        except ValueError as error:
            raise ValueError(self._out_of_reach(alpha, items, savings, before)) from error
        return self.base.plan_of(profile, {profile.sublayers[items[i]] for i in chosen})

    @property
    def online(self) -> bool:
        """Whether decode adds FFN sublayers, as AdaSkip does."""
        return self.base.online

    @property
    def window(self) -> int:
        """Decoded tokens to measure before it decides."""
        return self.base.window

    def online_plan(
        self,
        profile: Profile,
        plan: SkipPlan,
        window: npt.ArrayLike,
        probed: tuple[Sublayer, ...],
    ) -> SkipPlan:
        """Return what :meth:`AdaSkip.online_plan` does, with a beta that means as much.

        In the paper no sublayer that runs is more similar offline than one that is skipped. Here
        some are, because they would have saved too little; that is no reason to skip them after
        all. So an ffn must be more similar than every probed one was offline.

        Args:
            profile: what calibration measured on the model.
            plan: the plan so far.
            window: [len(probed), 5], sums of `PROBE_STATS` over the tokens of the window.
            probed: the ffn sublayers that were measured.
        """
        similarity = profile.similarity(self.base.variant)
        offline = zip(profile.sublayers, similarity, strict=True)
        least = max((float(value) for s, value in offline if s in probed), default=-math.inf)
        return self.base.online_plan(profile, plan, window, probed, least=least)

    def _seconds(self, plan: SkipPlan) -> list[float]:
        return [
            sum(w * self.table.seconds(plan, phase, self.context) for phase, w in weights.items())
            for weights in goals_of(self.phase)
        ]

    def _savings(self, profile: Profile) -> Array:
        """Return the seconds [sublayers, constraints] that skipping each sublayer saves.

        A sublayer saves its cost less that of its surrogate. One that cannot be skipped saves 0.
        """
        pairs = [
            (name, self._surrogate(profile, s)) if name else ("", "")
            for s, name in zip(profile.sublayers, self.table.classes, strict=True)
        ]
        columns = []
        for weights in goals_of(self.phase):
            saved = {("", ""): 0.0}
            for sublayer, surrogate in set(pairs) - saved.keys():
                saved[sublayer, surrogate] = sum(
                    weight * (self._cost(sublayer, phase) - self._cost(surrogate, phase))
                    for phase, weight in weights.items()
                )
            columns.append([saved[pair] for pair in pairs])
        return np.array(columns).T

    def _surrogate(self, profile: Profile, sublayer: Sublayer) -> str:
        """Return the cost term of a sublayer's surrogate; empty where the stream is passed on."""
        composed = compose_surrogates(self.base.plan_of(profile, {sublayer}), "prefill")
        return next(map(surrogate_term, composed.values()), "")

    def _cost(self, term: str, phase: Phase) -> float:
        return self.table.cost(term, phase, self.context) if term else 0.0

    def _losses(self, profile: Profile) -> list[float]:
        if self.losses is None:
            lost = 1 - profile.similarity(self.base.variant)
            return [float(value) for value in np.maximum(lost, 0)]  # rounding may say -1e-16
        missing = [str(s) for s in profile.sublayers if s not in self.losses]
        if missing:
            raise ValueError(f"losses has none for {missing[0]}: give one for each sublayer")
        return [float(self.losses[s]) for s in profile.sublayers]

    def _out_of_reach(
        self, alpha: float, items: list[int], savings: Array, before: list[float]
    ) -> str:
        best = []
        for weights, saved, seconds in zip(goals_of(self.phase), savings.T, before, strict=True):
            gains = sorted(max(0.0, float(saved[i])) for i in items)
            gained = sum(gains[1:] if len(items) == len(saved) else gains)  # one must run
            best.append(f"{seconds / (seconds - gained):.3g}x ({named(weights)})")
        return (
            f"alpha {alpha:g} cannot be met at {self.context:,} tokens: with every sublayer "
            f"skipped that can be, the best possible is {' and '.join(best)}; take a smaller alpha"
        )
