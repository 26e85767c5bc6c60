"""The plan of a policy that chooses once, from sublayers alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Compensation

if TYPE_CHECKING:
    from adaskip_fx.profiles.profile import Profile


def plan_without(profile: Profile, skip: Collection[Sublayer], compensated: bool) -> SkipPlan:
    """Skip `skip` in both phases; what is skipped becomes `scale * x` if `compensated`, else `x`.

    The scale is AdaSkip's (arXiv 2501.02336, eq. 4).
    """
    scale = profile.compensation().factors if compensated else {}
    compensation = Compensation.scale({s: f for s, f in scale.items() if s in skip})
    return SkipPlan.of(profile.sublayers, skip, compensation=compensation)
