"""Unified Layer Skipping (arXiv 2404.06954): an even spread of layers, the same for every input."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from adaskip_fx.policies.whole_layers import WholeLayers


@dataclass(frozen=True)
class UnifiedSkip(WholeLayers):
    """Keep k layers at equal distances, the first and the last among them.

    Of n layers kept layer j is number `round(j (n - 1) / (k - 1))`, halves up. Where the paper
    copies a skipped layer's K/V from the layer below while decoding, here it has none.
    """

    name: ClassVar[str] = "UnifiedSkip"

    def choose(self, candidates: list[int], count: int) -> Collection[int]:
        last, kept = len(candidates) - 1, len(candidates) - count
        steps = max(kept - 1, 1)
        places = {(2 * j * last + steps) // (2 * steps) for j in range(kept)}
        return [layer for place, layer in enumerate(candidates) if place not in places]
