"""A few plans, one by the prompt (as PuDDing 2502.04348 and FiRST do, by a nearest centroid)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaskip_fx.plans.decisions import Choice, Option
from adaskip_fx.policies.adaskip import AdaSkip
from adaskip_fx.policies.base import check_policy

if TYPE_CHECKING:
    from adaskip_fx.policies import PlanPolicy
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class Route:
    """One kind of prompts: its name, what was measured on it, and its mean input embedding.

    `adaskip_fx.contrib.routing.learn_routes` makes them from sets of texts.
    """

    name: str
    profile: Profile
    centroid: tuple[float, ...]


@dataclass(frozen=True)
class Router:
    """For each kind of prompts the plan that another policy makes of what was measured on it.

    Where the papers train a small network to choose, here the nearest centroid does.

    routes: the kinds of prompts.
    policy: makes the plans; nothing is learned while decoding.

    ValueError for no routes, or a profile of another model.
    """

    routes: tuple[Route, ...]
    policy: PlanPolicy = field(default_factory=AdaSkip)

    def __post_init__(self) -> None:
        if not self.routes:
            raise ValueError("Router: no routes were given; learn_routes makes them from texts")

    def check(self, model: Any) -> None:
        """Refuse what `policy` refuses."""
        check_policy(self.policy, model)

    def plan(self, profile: Profile, alpha: float) -> Choice:
        """The plans at `alpha`; of `profile` only its model counts."""
        for route in self.routes:
            if route.profile.fingerprint.digest != profile.fingerprint.digest:
                raise ValueError(
                    f"route {route.name} was measured on {route.profile.fingerprint}, but the "
                    f"model is {profile.fingerprint}; learn the routes on this model"
                )
        return Choice(
            tuple(
                Option(r.name, self.policy.plan(r.profile, alpha), r.centroid) for r in self.routes
            )
        )
