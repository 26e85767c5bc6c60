"""D3, position-aware depth decay decoding (arXiv 2503.08524): `floor(L a^i)` layers at step i."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from adaskip_fx.policies.depth_schedules import DepthSchedule

_HALVINGS = 60  # of the interval in which the decay is looked for


@dataclass(frozen=True)
class D3(DepthSchedule):
    """The depth decays as a power of the step; layers at both ends are the core and always run.

    Of the flexible layers between them those in the middle go first, the lower of two at the same
    distance; here that is our choice.

    decay: the base a, whatever alpha says; None finds the one whose mean over `length` steps is
        what alpha asks for.
    core: layers at each end that always run.
    """

    decay: float | None = None
    core: int = 2

    name: ClassVar[str] = "D3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay is not None and not 0 < self.decay <= 1:
            raise ValueError(f"D3: decay must be above 0 and at most 1, got {self.decay!r}")

    def order(self, layers: Sequence[int]) -> Sequence[int]:
        """From the middle outwards."""
        first = max(self.core, 2) if self.protected else self.core
        flexible = layers[first : len(layers) - max(self.core, 1)]
        middle = (layers[0] + layers[-1]) / 2
        return sorted(flexible, key=lambda layer: (abs(layer - middle), layer))

    def depths(self, total: int, fewest: int, mean: Fraction) -> list[int]:
        """Of `decay`, or of the largest one whose mean is not above `mean`."""
        if self.decay is not None:
            return self._decayed(total, fewest, self.decay)
        if mean < fewest:
            raise self.refuse(mean, total, fewest)
        if mean == total:
            return [total] * self.length
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = sum(self._decayed(total, fewest, middle)) > mean * self.length
            low, high = (low, middle) if above else (middle, high)
        return self._decayed(total, fewest, low)

    def _decayed(self, total: int, fewest: int, decay: float) -> list[int]:
        return [max(fewest, math.floor(total * decay**i)) for i in range(self.length)]
