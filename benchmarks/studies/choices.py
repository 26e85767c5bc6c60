"""What is compared: policies and compensations. A new one is a line here.

A planner gets the subject, a profile, alpha and calibration windows, of which statistics need the
profile alone and searches the windows. A fit gets the subject, the profile, what is skipped and
the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from adaskip_fx.compensation import Compensation
from adaskip_fx.plan import SkipPlan, Sublayer
from adaskip_fx.policies import AdaSkip, EarlyExit, LLMDrop, Policy, ReverseOrder, UnifiedSkip
from adaskip_fx.profile import Profile

from .setup import Subject

Windows = Sequence[torch.Tensor]
#: what it gives is a plan, or something that a request may begin with and that has ``plans``
Planner = Callable[[Subject, Profile, float, Windows], Any]
Fit = Callable[[Subject, Profile, Sequence[Sublayer], Windows], Compensation]


@dataclass(frozen=True)
class Choice:
    """A policy twice: as its authors define it, and as we would use it (with protection).

    variant: what the second has that the first has not; empty for nothing.
    """

    name: str
    published: Planner
    ours: Planner
    variant: str = ""


def by_profile(policy: Policy) -> Planner:
    """A planner that needs nothing but the profile."""

    def plan(_subject: Subject, profile: Profile, alpha: float, _windows: Windows) -> Any:
        return policy.plan(profile, alpha)

    return plan


def _same(name: str, policy: Policy) -> Choice:
    return Choice(name, by_profile(policy), by_profile(policy))


def _protected(name: str, policy: type[UnifiedSkip | EarlyExit | ReverseOrder]) -> Choice:
    ours = by_profile(policy(protected=True))
    return Choice(name, by_profile(policy()), ours, "protected")


POLICIES = (
    _same("AdaSkip", AdaSkip()),
    _same("LLMDrop", LLMDrop()),
    _protected("UnifiedSkip", UnifiedSkip),
    _protected("EarlyExit", EarlyExit),
    _protected("ReverseOrder", ReverseOrder),
)


def _none(_s: Subject, _profile: Profile, _skip: Sequence[Sublayer], _w: Windows) -> Compensation:
    return Compensation()


def _scale(_s: Subject, profile: Profile, skip: Sequence[Sublayer], _w: Windows) -> Compensation:
    factors = profile.compensation().factors
    return Compensation.scale({s: factors[s] for s in skip})


COMPENSATIONS: Mapping[str, Fit] = MappingProxyType({"none": _none, "scale": _scale})


def chosen_compensations(names: Sequence[str]) -> dict[str, Fit]:
    """Those named; all when none is. ValueError for an unknown one."""
    unknown = [name for name in names if name not in COMPENSATIONS]
    if unknown:
        raise ValueError(
            f"no compensation {unknown[0]!r}; this version has {', '.join(COMPENSATIONS)}"
        )
    return {name: fit for name, fit in COMPENSATIONS.items() if not names or name in names}


def plans_in(decision: Any) -> tuple[SkipPlan, ...]:
    """The plan, or those of a schedule or a choice."""
    return (decision,) if isinstance(decision, SkipPlan) else tuple(decision.plans)


def compensated(plan: SkipPlan, compensation: Compensation) -> SkipPlan:
    """The same sublayers left out, with another compensation."""
    return replace(plan, compensation=compensation)


def left_out(plan: SkipPlan) -> tuple[Sublayer, ...]:
    """What does not run in either phase, in stream order (also where its K/V is still written)."""
    return tuple(s for s in plan.sublayers if s in plan.prefill or s in plan.decode)
