"""What several policies share: the plan of a set of sublayers, and the check of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

from adaskip_fx.plans.decisions import Decision, of_model
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates

if TYPE_CHECKING:
    from adaskip_fx.profiles.profile import Profile


F = TypeVar("F", bound=Callable[..., Decision])


@runtime_checkable
class CheckedPolicy(Protocol):
    """A policy that is not for every model; `adaskip_fx.compile` lets it check the model first."""

    def check(self, model: Any) -> None:
        """Refuse a model, a dtype or a device that the policy knows nothing of.

        Raises:
            ValueError: the message says what differs and what to do.
        """
        ...


def for_its_model(plan: F) -> F:
    """Have what a policy's `plan` decides say which model it is for: the profile's."""

    @functools.wraps(plan)
    def of_profile(policy: Any, profile: Profile, alpha: float) -> Decision:
        return of_model(plan(policy, profile, alpha), profile.fingerprint)

    return cast("F", of_profile)


def check_policy(policy: object, model: Any) -> None:
    """Let `policy` refuse a model that it is not for; a policy without `check` is for all models.

    Raises:
        ValueError: the policy refuses the model.
    """
    if isinstance(policy, CheckedPolicy):
        policy.check(model)


def plan_without(profile: Profile, skip: Collection[Sublayer], scaled: bool) -> SkipPlan:
    """Return the plan that skips `skip` in both phases.

    A skipped sublayer becomes `scale * x` if `scaled`, else `x`. The scale is AdaSkip's
    (arXiv 2501.02336, eq. 4).
    """
    scale = profile.scales().factors if scaled else {}
    surrogates = Surrogates.scale({s: f for s, f in scale.items() if s in skip})
    return SkipPlan.of(profile.sublayers, skip, surrogates=surrogates)
