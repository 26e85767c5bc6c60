"""One file per system: from what calibration measured and a target speed to a skip plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy.typing as npt

from adaskip_fx.policies.adaskip import AdaSkip
from adaskip_fx.policies.early_exit import EarlyExit
from adaskip_fx.policies.latency import LatencyBudget
from adaskip_fx.policies.llm_drop import LLMDrop
from adaskip_fx.policies.reverse_order import ReverseOrder
from adaskip_fx.policies.unified_skip import UnifiedSkip

if TYPE_CHECKING:
    from adaskip_fx.plan import SkipPlan, Sublayer
    from adaskip_fx.profile import Profile

__all__ = [
    "AdaSkip",
    "EarlyExit",
    "LLMDrop",
    "LatencyBudget",
    "OnlinePolicy",
    "Policy",
    "ReverseOrder",
    "UnifiedSkip",
]


class Policy(Protocol):
    """A rule that chooses sublayers."""

    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """The plan for `profile`'s model at acceleration ratio `alpha` (1.0: skip nothing)."""
        ...


@runtime_checkable
class OnlinePolicy(Policy, Protocol):
    """A policy that may add FFN sublayers to the decode plan of a running request."""

    @property
    def online(self) -> bool:
        """Whether it learns at all."""
        ...

    @property
    def window(self) -> int:
        """Decoded tokens to measure before it decides."""
        ...

    def online_plan(
        self,
        profile: Profile,
        plan: SkipPlan,
        window: npt.ArrayLike,
        probed: tuple[Sublayer, ...],
    ) -> SkipPlan:
        """The plan for the rest of the request, from moments [probed, 5] of its window."""
        ...
