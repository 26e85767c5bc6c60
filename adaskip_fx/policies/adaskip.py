"""AdaSkip (arXiv 2501.02336): skip the sublayers that change the residual stream least.

Prefill skips the top of a joint ranking of attention and ffn by offline similarity. Decode learns
from a window of the request's tokens which further ffn sublayers to skip.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt

from adaskip_fx.plans.skip_plan import Action, SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import SANE_FACTORS, Surrogates
from adaskip_fx.policies.base import for_its_model
from adaskip_fx.profiles.profile import PROBE_STATS, Variant

if TYPE_CHECKING:
    from adaskip_fx.profiles.profile import Profile

Statistics = npt.NDArray[np.float64]  # [sublayers, 5], sums of `PROBE_STATS`
_COSINE, _BEFORE, _AFTER, _TOKENS = map(
    PROBE_STATS.index, ("cosine", "before_squared", "after_squared", "tokens")
)


def skip_count(alpha: float, sublayers: int) -> int:
    """Return how many of S = `sublayers` to skip at acceleration ratio `alpha`.

    `floor(S (1 - 1/alpha) + 1/2)`: the paper's 2m with m = L - L/alpha (S = 2L in a plain
    transformer), rounded half up. `alpha` is read as the simplest fraction that the float stands
    for, so 4/3 rounds like four thirds and not like the float just below it.

    Raises:
        ValueError: `alpha` is not a number, below 1, or so large that nothing would be left.
    """
    if sublayers < 1:
        raise ValueError(f"a model has at least 1 sublayer, got {sublayers}")
    # NaN and infinity fail the comparison as well.
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 1 <= alpha < 2 * sublayers:
        raise ValueError(
            "alpha, the acceleration ratio, must be a number of at least 1 (skip nothing) and "
            f"below {2 * sublayers} (which would skip all {sublayers} sublayers); got {alpha!r}"
        )
    ratio = Fraction(float(alpha)).limit_denominator(10**6)
    count = math.floor(sublayers * (1 - 1 / ratio) + Fraction(1, 2))
    return min(count, sublayers - 1)  # the fraction may be 2S where the float is just below


@dataclass(frozen=True)
class AdaSkip:
    """The paper's policy.

    Attributes:
        window: P, the decoded tokens over which the ffn sublayers that still run are measured.
        variant: `"paper"` follows the paper's text; `"released"` the authors' code where it differs
            (equal weight per sample, scale from whole-tensor norms, an extra ffn is scaled by the
            ratio of norms in its window and added at `>=`).
        online: whether decode learns extra ffn sublayers at all.

    Raises:
        ValueError: a window below 1, or an unknown variant.
    """

    window: int = 20
    variant: Variant = "paper"
    online: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be at least 1 token, got {self.window!r}")
        if self.variant not in get_args(Variant):
            known = " or ".join(map(repr, get_args(Variant)))
            raise ValueError(f"unknown variant {self.variant!r}: use {known}")

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return the plan that skips the `skip_count(alpha, S)` most similar sublayers.

        Attention, ffn and mixers are ranked jointly, ties in stream order, and no layer is
        protected.

        Raises:
            ValueError: `skip_count` refuses `alpha`.
        """
        sublayers = profile.sublayers
        count = skip_count(alpha, len(sublayers))
        ranking = np.argsort(-profile.similarity(self.variant), kind="stable")
        return self.plan_of(profile, {sublayers[i] for i in ranking[:count]})

    def plan_of(self, profile: Profile, skip: Collection[Sublayer]) -> SkipPlan:
        """Return the plan that skips just `skip`, in both phases, each with its scale (eq. 4)."""
        if not skip:
            return SkipPlan.empty(profile.sublayers)
        # Every ffn gets its factor now: decode may add any of them, and the plan alone, without
        # the profile, then has its surrogate.
        scale = profile.scales(self.variant).factors
        factors = {s: f for s, f in scale.items() if s in skip or s.kind == "ffn"}
        return SkipPlan.of(profile.sublayers, skip, surrogates=Surrogates.scale(factors))

    def threshold(self, profile: Profile, plan: SkipPlan) -> float | None:
        """Return beta, the least offline similarity of a skipped sublayer; None if there is none.

        Raises:
            ValueError: the plan and the profile are not of the same sublayers.
        """
        if plan.sublayers != profile.sublayers:
            raise ValueError(
                f"the plan has {len(plan.sublayers)} sublayers and the profile "
                f"{len(profile.sublayers)}, or their order differs: they are of different models"
            )
        similarity = dict(zip(profile.sublayers, profile.similarity(self.variant), strict=True))
        return min((float(similarity[s]) for s in plan.skipped("prefill")), default=None)

    def online_plan(
        self,
        profile: Profile,
        plan: SkipPlan,
        window: npt.ArrayLike,
        probed: tuple[Sublayer, ...],
        *,
        least: float = -math.inf,
    ) -> SkipPlan:
        """Return `plan` with every probed ffn whose mean similarity is above beta added to decode.

        At least one sublayer keeps running: if beta would leave none, the most similar are added.

        Args:
            profile: what calibration measured on the model.
            plan: the plan so far.
            window: [len(probed), 5], sums of `PROBE_STATS` over the window's tokens (all rows of
                the batch together). A sublayer with no tokens, with a sum that is not finite, or
                (`"released"`) with a ratio of norms outside of `SANE_FACTORS`, is no evidence and
                is not added.
            probed: the ffn sublayers that were measured.
            least: takes the place of a beta below it.

        Raises:
            ValueError: `probed` names anything but ffn sublayers of the plan, each once, or
                `window` has another shape.
        """
        statistics = _check_window(plan, window, probed)
        beta = self.threshold(profile, plan)
        if beta is None or not self.online:
            return plan
        chosen = self._above(max(beta, least), statistics, probed)
        # What prefill skips keeps its surrogate from there, and a fitted surrogate is kept as well.
        known = plan.surrogates.by_sublayer
        if self.variant == "released":
            scale = _window_scale(statistics, probed)
            chosen = [s for s in chosen if SANE_FACTORS[0] <= scale[s] <= SANE_FACTORS[1]]
            known = {s: c for s, c in known.items() if s in plan.prefill or c.factor is None}
        else:
            scale = profile.scales().factors
        running = [s for s in plan.sublayers if plan.action("decode", s) is Action.RUN]
        extra = [s for s in chosen if s in running][: len(running) - 1]
        factors = {s: scale[s] for s in extra if s not in known and s not in plan.prefill}
        return plan.with_decode_extra(extra, factors)

    def _above(
        self, beta: float, statistics: Statistics, probed: tuple[Sublayer, ...]
    ) -> list[Sublayer]:
        """Return the sublayers that pass the threshold, the most similar first."""
        similarity: Mapping[Sublayer, float] = {
            s: row[_COSINE] / row[_TOKENS]
            for s, row in zip(probed, statistics, strict=True)
            if row[_TOKENS] > 0 and np.isfinite(row).all()
        }
        passing = {
            s: value
            for s, value in similarity.items()
            if value > beta or (self.variant == "released" and value == beta)
        }
        return sorted(passing, key=lambda s: (-passing[s], s))


def _window_scale(statistics: Statistics, probed: tuple[Sublayer, ...]) -> Mapping[Sublayer, float]:
    """Return sqrt(sum |b|^2 / sum |a|^2) over the window, for each probed sublayer."""
    # A factor that is no number is refused, by name, when a surrogate takes it.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt(statistics[:, _AFTER] / statistics[:, _BEFORE])
    return dict(zip(probed, ratio.tolist(), strict=True))


def _check_window(
    plan: SkipPlan, window: npt.ArrayLike, probed: tuple[Sublayer, ...]
) -> Statistics:
    for sublayer in probed:
        if sublayer.kind != "ffn":
            raise ValueError(
                f"{sublayer}: only ffn sublayers are added in decode; without its K/V the next "
                "turn would read holes"
            )
        plan.action("decode", sublayer)  # PlanError when the model has no such sublayer
    if len(set(probed)) != len(probed):
        raise ValueError("a sublayer is listed twice in `probed`")
    statistics = np.asarray(window, dtype=np.float64)
    if statistics.shape != (len(probed), len(PROBE_STATS)):
        raise ValueError(
            f"window must have shape {(len(probed), len(PROBE_STATS))}, got {statistics.shape}"
        )
    return statistics
