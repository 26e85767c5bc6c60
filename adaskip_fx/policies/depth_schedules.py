"""Schedules that run fewer whole layers the longer a turn gets: what such policies share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, ClassVar

from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.phase_split import decode_only
from adaskip_fx.policies.base import plan_without

if TYPE_CHECKING:
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class DepthSchedule(ABC):
    """A policy whose prompts run in full and whose decoding runs fewer and fewer layers.

    Attention of a layer that is skipped still writes its K/V. Within a turn nobody reads it, since
    what is skipped stays skipped; the next turn's prompt does.

    length: decoded tokens over which the depth falls; afterwards it stays. alpha is the mean over
        these tokens.
    levels: plans at most: programs to be linked for a request.
    scaled: whether a skipped sublayer becomes AdaSkip's `scale * x` (eq. 4) instead of `x`.
    protected: whether the first two layers and the last always run.

    The last two are not part of the rules as their authors give them. ValueError for a length or
    number of levels below 1.
    """

    length: int = 256
    levels: int = 4
    scaled: bool = False
    protected: bool = False

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for what in ("length", "levels"):
            value = getattr(self, what)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.name}: {what} must be at least 1, got {value!r}")

    @abstractmethod
    def order(self, layers: Sequence[int]) -> Sequence[int]:
        """The layers that may be skipped, in the order in which they are."""

    @abstractmethod
    def depths(self, total: int, fewest: int, mean: Fraction) -> list[int]:
        """How many of `total` layers run at each decode step of `length`, never rising.

        ValueError where no depths from `total` down to `fewest` have about this mean.
        """

    def plan(self, profile: Profile, alpha: float) -> Schedule:
        """A schedule of L/alpha layers in the mean; ValueError for an alpha that cannot be."""
        layers = sorted({s.layer for s in profile.sublayers})
        order, total = self.order(layers), len(layers)
        depths = self.depths(total, total - len(order), _mean_depth(alpha, total))
        return Schedule(
            tuple(
                (first, decode_only(plan_without(profile, skip, self.scaled)))
                for first, depth in coarse(depths, self.levels)
                for skip in [[s for s in profile.sublayers if s.layer in order[: total - depth]]]
            )
        )

    def refuse(self, mean: Fraction, total: int, fewest: int) -> ValueError:
        return ValueError(
            f"{self.name} cannot run {float(mean):.1f} of {total} layers in the mean, with "
            f"{fewest} at least: take a smaller alpha"
        )


def coarse(depths: Sequence[int], levels: int) -> list[tuple[int, int]]:
    """At most `levels` pairs of a first step and the depth from there on.

    Steps are cut into parts of equal length; each has its mean depth, halves rounded up.
    """
    count = min(levels, len(depths))
    bounds = [len(depths) * i // count for i in range(count + 1)]
    parts = [depths[a:b] for a, b in pairwise(bounds)]
    means = [math.floor(Fraction(sum(part), len(part)) + Fraction(1, 2)) for part in parts]
    pairs = zip(bounds, means, strict=False)
    return [next(group) for _, group in groupby(pairs, key=lambda pair: pair[1])]


def _mean_depth(alpha: float, total: int) -> Fraction:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 1 <= alpha < math.inf:
        raise ValueError(
            f"alpha, the acceleration ratio, must be a number of at least 1; got {alpha!r}"
        )
    return total / Fraction(float(alpha)).limit_denominator(10**6)
