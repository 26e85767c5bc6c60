"""Policies: from what calibration measured and a target speed to a decision.

A decision is a plan, a schedule of decode plans, or a choice among plans by the prompt. What a
policy needs besides a profile (such as who judges candidate plans) are fields of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy.typing as npt

from adaskip_fx.policies.adaskip import AdaSkip
from adaskip_fx.policies.base import CheckedPolicy
from adaskip_fx.policies.candidates import Evaluator, FitSurrogates
from adaskip_fx.policies.depth_schedules import D3, SkipDecode
from adaskip_fx.policies.evolve import Evolve
from adaskip_fx.policies.fitted import Fitted
from adaskip_fx.policies.greedy import Greedy
from adaskip_fx.policies.latency_budget import LatencyBudget
from adaskip_fx.policies.layer_baselines import EarlyExit, ReverseOrder, ShortGPT, UnifiedSkip
from adaskip_fx.policies.llm_drop import LLMDrop
from adaskip_fx.policies.pop import POP, DecodeOnly
from adaskip_fx.policies.timed_by_similarity import TimedBySimilarity
from adaskip_fx.policies.timed_greedy import TimedGreedy
from adaskip_fx.policies.windowed import Windowed
from adaskip_fx.policies.windowed_by_similarity import WindowedBySimilarity

if TYPE_CHECKING:
    from adaskip_fx.plans.decisions import Decision
    from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
    from adaskip_fx.profiles.profile import Profile

__all__ = [
    "D3",
    "POP",
    "AdaSkip",
    "CheckedPolicy",
    "DecodeOnly",
    "DescribedPolicy",
    "EarlyExit",
    "Evaluator",
    "Evolve",
    "FitSurrogates",
    "Fitted",
    "Greedy",
    "LLMDrop",
    "LatencyBudget",
    "OnlinePolicy",
    "PlanPolicy",
    "Policy",
    "ReverseOrder",
    "ShortGPT",
    "SkipDecode",
    "TimedBySimilarity",
    "TimedGreedy",
    "UnifiedSkip",
    "Windowed",
    "WindowedBySimilarity",
]


class Policy(Protocol):
    """A rule that chooses sublayers."""

    def plan(self, profile: Profile, alpha: float) -> Decision:
        """Return the decision for `profile`'s model at acceleration ratio `alpha`.

        At 1.0 nothing is skipped.
        """
        ...


class PlanPolicy(Protocol):
    """A policy whose decision is one plan, which other policies may build on."""

    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return the plan for `profile`'s model at acceleration ratio `alpha`.

        At 1.0 nothing is skipped.
        """
        ...


@runtime_checkable
class DescribedPolicy(Protocol):
    """A policy that has something to say of a plan; ``print(fast.adaskip)`` shows it."""

    def describe(self, plan: SkipPlan) -> str:
        """Return a line of text, or a few."""
        ...


@runtime_checkable
class OnlinePolicy(PlanPolicy, Protocol):
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
        """Return the plan for the rest of the request.

        Args:
            profile: what calibration measured on the model.
            plan: the plan so far.
            window: [len(probed), 5], sums of `PROBE_STATS` over the tokens of the window.
            probed: the ffn sublayers that were measured.
        """
        ...
