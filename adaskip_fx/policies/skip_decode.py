"""SkipDecode (arXiv 2307.02628): the later the token, the fewer layers, the upper ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from adaskip_fx.policies.depth_schedules import DepthSchedule


@dataclass(frozen=True)
class SkipDecode(DepthSchedule):
    """The budget falls linearly with the position; lower to middle layers go, top layers run.

    A few layers before those that are skipped always run and warm the stream up. The schedule is
    the same for every row of a batch. The authors fine-tune their models for it.

    warm_up: layers at the beginning that always run.
    """

    warm_up: int = 1

    name: ClassVar[str] = "SkipDecode"

    def order(self, layers: Sequence[int]) -> Sequence[int]:
        """From below; the last layer is not among them."""
        first = max(self.warm_up, 2) if self.protected else self.warm_up
        return layers[first:-1]

    def depths(self, total: int, fewest: int, mean: Fraction) -> list[int]:
        """From all layers down, or from fewer where the mean needs it; halves rounded up."""
        last = max(2 * mean - total, Fraction(fewest))
        first = 2 * mean - last
        if first < last:
            raise self.refuse(mean, total, fewest)
        fall = (first - last) / max(self.length - 1, 1)
        return [math.floor(first - fall * i + Fraction(1, 2)) for i in range(self.length)]
