"""ShortGPT (arXiv 2403.03853): the layers that turn the residual stream least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adaskip_fx.policies.adaskip import skip_count
from adaskip_fx.policies.base import plan_without

if TYPE_CHECKING:
    from adaskip_fx.plans.skip_plan import SkipPlan
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class ShortGPT:
    """Skip whole layers of the least block influence, `1 - E cos(before, after)` (eq. 1).

    scaled: whether a skipped sublayer becomes AdaSkip's `scale * x` (eq. 4) instead of `x`.
    protected: whether the first two layers and the last always run.

    Neither is part of the rule as its authors give it.
    """

    scaled: bool = False
    protected: bool = False

    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Skip `skip_count(alpha, L)` of the model's L layers, ties in the order of layers.

        ValueError for an `alpha` that `skip_count` refuses, when too few layers may be skipped, or
        for a profile without whole layers.
        """
        layers = profile.layer_numbers
        count = skip_count(alpha, len(layers))
        ranking = [layers[i] for i in np.argsort(-profile.layer_similarity(), kind="stable")]
        if self.protected:
            ranking = [layer for layer in ranking if layer not in (*layers[:2], layers[-1])]
        if count > len(ranking):
            raise ValueError(
                f"alpha {alpha} skips {count} of {len(layers)} layers, but ShortGPT may skip "
                f"{len(ranking)}: take a smaller alpha"
            )
        skip = [s for s in profile.sublayers if s.layer in ranking[:count]]
        return plan_without(profile, skip, self.scaled)
