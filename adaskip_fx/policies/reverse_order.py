"""Reverse order (arXiv 2411.15558): from the end, but never the last layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from adaskip_fx.policies.whole_layers import WholeLayers


@dataclass(frozen=True)
class ReverseOrder(WholeLayers):
    """Skip the last layers before the last one."""

    name: ClassVar[str] = "ReverseOrder"

    def choose(self, candidates: list[int], count: int) -> Collection[int]:
        before_last = candidates if self.protected else candidates[:-1]
        return before_last[-count:]
