"""Schedules that run fewer whole layers the longer a turn gets: SkipDecode and D3."""

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
from adaskip_fx.policies.base import for_its_model, plan_without

if TYPE_CHECKING:
    from adaskip_fx.profiles.profile import Profile

_BISECTIONS = 60  # of the interval in which the decay of D3 is looked for


@dataclass(frozen=True)
class DepthSchedule(ABC):
    """A policy whose prompts run in full and whose decoding runs fewer and fewer layers.

    Attention of a layer that is skipped still writes its K/V. Within a turn nobody reads it, since
    what is skipped stays skipped; the next turn's prompt does.

    `scaled` and `protected` are not part of the rules as their authors give them.

    Attributes:
        length: decoded tokens over which the depth falls; afterwards it stays. alpha is the mean
            over these tokens.
        levels: how many different plans there are at most; each is a program to be linked for a
            request.
        scaled: whether a skipped sublayer becomes AdaSkip's `scale * x` (eq. 4) instead of `x`.
        protected: whether the first two layers and the last always run.

    Raises:
        ValueError: `length` or `levels` is below 1.
    """

    length: int = 256
    levels: int = 4
    scaled: bool = False
    protected: bool = False

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in ("length", "levels"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.name}: {field} must be at least 1, got {value!r}")

    @abstractmethod
    def order(self, layers: Sequence[int]) -> Sequence[int]:
        """Return the layers that may be skipped, in the order in which they are."""

    @abstractmethod
    def depths(self, total: int, fewest: int, mean: Fraction) -> list[int]:
        """Return how many of `total` layers run at each decode step of `length`, never rising.

        Args:
            total: all layers of the model.
            fewest: layers that always run.
            mean: layers that are to run at a step in the mean.

        Raises:
            ValueError: no depths from `total` down to `fewest` have about this mean.
        """

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> Schedule:
        """Return a schedule that runs L/alpha layers in the mean.

        Raises:
            ValueError: no schedule has this mean.
        """
        layers = profile.layer_numbers
        order, total = self.order(layers), len(layers)
        depths = self.depths(total, total - len(order), _mean_depth(alpha, total))
        steps = []
        for first_step, depth in in_levels(depths, self.levels):
            gone = set(order[: total - depth])
            skip = [s for s in profile.sublayers if s.layer in gone]
            steps.append((first_step, decode_only(plan_without(profile, skip, self.scaled))))
        return Schedule(tuple(steps))

    def _unreachable(self, mean: Fraction, total: int, fewest: int) -> ValueError:
        return ValueError(
            f"{self.name} cannot run {float(mean):.1f} of {total} layers in the mean, with "
            f"{fewest} at least: take a smaller alpha"
        )


@dataclass(frozen=True)
class SkipDecode(DepthSchedule):
    """The depth falls linearly with the position (SkipDecode, arXiv 2307.02628).

    Lower to middle layers are skipped and the top layers run. A few layers before those that are
    skipped always run and warm the stream up. The schedule is the same for every row of a batch.
    The authors fine-tune their models for it.

    Attributes:
        warm_up: layers at the beginning that always run.
    """

    warm_up: int = 1

    name: ClassVar[str] = "SkipDecode"

    def order(self, layers: Sequence[int]) -> Sequence[int]:
        """Return the layers from below; the last layer is not among them."""
        first = max(self.warm_up, 2) if self.protected else self.warm_up
        return layers[first:-1]

    def depths(self, total: int, fewest: int, mean: Fraction) -> list[int]:
        """Return depths that fall from all layers, or from fewer where the mean needs it.

        Halves are rounded up.
        """
        last = max(2 * mean - total, Fraction(fewest))
        first = 2 * mean - last
        if first < last:
            raise self._unreachable(mean, total, fewest)
        fall = (first - last) / max(self.length - 1, 1)
        return [math.floor(first - fall * i + Fraction(1, 2)) for i in range(self.length)]


@dataclass(frozen=True)
class D3(DepthSchedule):
    """The depth decays as a power of the step: `floor(L a^i)` layers run at step i.

    From D3, position-aware depth decay decoding (arXiv 2503.08524). Layers at both ends are the
    core and always run. Of the flexible layers between them those in the middle are skipped first,
    the lower of two at the same distance; this order is our choice.

    Attributes:
        decay: the base a, whatever alpha says; None finds the one whose mean over `length` steps is
            what alpha asks for.
        core: layers at each end that always run.

    Raises:
        ValueError: `decay` is not in (0, 1], or as for `DepthSchedule`.
    """

    decay: float | None = None
    core: int = 2

    name: ClassVar[str] = "D3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay is not None and not 0 < self.decay <= 1:
            raise ValueError(f"D3: decay must be above 0 and at most 1, got {self.decay!r}")

    def order(self, layers: Sequence[int]) -> Sequence[int]:
        """Return the flexible layers from the middle outwards."""
        first = max(self.core, 2) if self.protected else self.core
        flexible = layers[first : len(layers) - max(self.core, 1)]
        middle = (layers[0] + layers[-1]) / 2
        return sorted(flexible, key=lambda layer: (abs(layer - middle), layer))

    def depths(self, total: int, fewest: int, mean: Fraction) -> list[int]:
        """Return the depths of `decay`, or of the largest one whose mean is at most `mean`."""
        if self.decay is not None:
            return self._decayed(total, fewest, self.decay)
        if mean < fewest:
            raise self._unreachable(mean, total, fewest)
        if mean == total:
            return [total] * self.length
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            above = sum(self._decayed(total, fewest, middle)) > mean * self.length
            low, high = (low, middle) if above else (middle, high)
        return self._decayed(total, fewest, low)

    def _decayed(self, total: int, fewest: int, decay: float) -> list[int]:
        return [max(fewest, math.floor(total * decay**i)) for i in range(self.length)]


def in_levels(depths: Sequence[int], levels: int) -> list[tuple[int, int]]:
    """Return at most `levels` pairs of a first step and the depth from there on.

    Steps are cut into intervals of equal length; each has its mean depth, halves rounded up.
    """
    count = min(levels, len(depths))
    bounds = [len(depths) * i // count for i in range(count + 1)]
    intervals = [depths[a:b] for a, b in pairwise(bounds)]
    means = [math.floor(Fraction(sum(d), len(d)) + Fraction(1, 2)) for d in intervals]
    pairs = zip(bounds, means, strict=False)
    return [next(group) for _, group in groupby(pairs, key=lambda pair: pair[1])]


def _mean_depth(alpha: float, total: int) -> Fraction:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 1 <= alpha < math.inf:
        raise ValueError(
            f"alpha, the acceleration ratio, must be a number of at least 1; got {alpha!r}"
        )
    return total / Fraction(float(alpha)).limit_denominator(10**6)
