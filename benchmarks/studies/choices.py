"""The policies that are compared. A new one is a line here.

A planner gets the subject, a profile, alpha and calibration windows, of which statistics need the
profile alone and searches the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.policies import (
    D3,
    POP,
    AdaSkip,
    DecodeOnly,
    EarlyExit,
    Evolve,
    Greedy,
    LLMDrop,
    Policy,
    ReverseOrder,
    ShortGPT,
    SkipDecode,
    UnifiedSkip,
)
from adaskip_fx.profiles.profile import Profile

from .setup import Subject

Windows = Sequence[torch.Tensor]
#: what it gives is a plan, or something that a request may begin with and that has ``plans``
Planner = Callable[[Subject, Profile, float, Windows], Any]


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


def _protected(
    name: str, policy: type[UnifiedSkip | EarlyExit | ReverseOrder | ShortGPT]
) -> Choice:
    ours = by_profile(policy(protected=True))
    return Choice(name, by_profile(policy()), ours, "protected")


def _schedule(name: str, policy: type[SkipDecode | D3]) -> Choice:
    """Ours with the scale too: a schedule's plans are all made by the policy.

    A schedule falls over as many tokens as are decoded.
    """

    def planner(ours: bool) -> Planner:
        def plan(subject: Subject, profile: Profile, alpha: float, _windows: Windows) -> Any:
            return policy(subject.decoded, scaled=ours, protected=ours).plan(profile, alpha)

        return plan

    return Choice(name, planner(False), planner(True), "protected")


def _searched(name: str, make: Callable[[CalibrationLoss, bool], Policy]) -> Choice:
    """A search of plans without compensation, and of plans with AdaSkip's scale."""

    def planner(scaled: bool) -> Planner:
        def plan(subject: Subject, profile: Profile, alpha: float, windows: Windows) -> Any:
            return make(judge(subject, windows), scaled).plan(profile, alpha)

        return plan

    return Choice(name, planner(False), planner(True))


_judges: dict[Subject, CalibrationLoss] = {}


def judge(subject: Subject, windows: Windows) -> CalibrationLoss:
    """KL on one calibration window; one for all searches of a subject, since it remembers."""
    if subject not in _judges:
        _judges[subject] = CalibrationLoss(subject.compiled, windows[:1])
    return _judges[subject]


POLICIES = (
    _same("AdaSkip", AdaSkip()),
    _same("LLMDrop", LLMDrop()),
    _protected("UnifiedSkip", UnifiedSkip),
    _protected("EarlyExit", EarlyExit),
    _protected("ReverseOrder", ReverseOrder),
    _protected("ShortGPT", ShortGPT),
    _schedule("SkipDecode", SkipDecode),
    _schedule("D3", D3),
    _same("POP", POP()),
    _same("DecodeOnly", DecodeOnly(AdaSkip())),
    _searched("Greedy", lambda loss, c: Greedy(loss, scaled=c, shortlist=12)),
    _searched("Evolve", lambda loss, c: Evolve(loss, scaled=c, generations=8, offspring=8)),
)


def chosen_policies(names: Sequence[str]) -> tuple[Choice, ...]:
    """Those named; all when none is. ValueError for an unknown one."""
    known = {policy.name: policy for policy in POLICIES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no policy {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(p for name, p in known.items() if not names or name in names)


def plans_in(decision: Any) -> tuple[SkipPlan, ...]:
    """The plan, or those of a schedule or a choice."""
    return (decision,) if isinstance(decision, SkipPlan) else tuple(decision.plans)


def left_out(plan: SkipPlan) -> tuple[Sublayer, ...]:
    """What does not run in either phase, in stream order (also where its K/V is still written)."""
    return tuple(s for s in plan.sublayers if s in plan.prefill or s in plan.decode)
