"""Early exit at a fixed layer: the last layers are left out (the baseline of AdaSkip's paper).

LITE (arXiv 2310.18581) and AdaInfer (arXiv 2403.02181) choose the exit token by token; at one
speed-up for all tokens their plan is this one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from adaskip_fx.policies.whole_layers import WholeLayers


@dataclass(frozen=True)
class EarlyExit(WholeLayers):
    """Skip the last layers. (When `protected`, all but the last: that is `ReverseOrder`.)"""

    name: ClassVar[str] = "EarlyExit"

    def choose(self, candidates: list[int], count: int) -> Collection[int]:
        return candidates[-count:]
