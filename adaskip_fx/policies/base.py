"""What several policies share: the plan of a choice, and asking whether a model is theirs."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates

if TYPE_CHECKING:
    from adaskip_fx.profiles.profile import Profile


@runtime_checkable
class CheckedPolicy(Protocol):
    """A policy that is not for every model; `adaskip_fx.compile` asks it first."""

    def check(self, model: Any) -> None:
        """Refuse a model, a dtype or a device that it knows nothing of.

        Raises:
            ValueError: says what differs and what to do.
        """
        ...


def check_policy(policy: object, model: Any) -> None:
    """Have a policy refuse a model that is not its; one that does not check is for all of them.

    Raises:
        ValueError: from the policy.
    """
    if isinstance(policy, CheckedPolicy):
        policy.check(model)


def plan_without(profile: Profile, skip: Collection[Sublayer], scaled: bool) -> SkipPlan:
    """Skip `skip` in both phases; what is skipped becomes `scale * x` if `scaled`, else `x`.

    The scale is AdaSkip's (arXiv 2501.02336, eq. 4).
    """
    scale = profile.scales().factors if scaled else {}
    surrogates = Surrogates.scale({s: f for s, f in scale.items() if s in skip})
    return SkipPlan.of(profile.sublayers, skip, surrogates=surrogates)
