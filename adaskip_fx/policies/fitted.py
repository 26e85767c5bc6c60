"""A plan that was fitted beforehand, with AdaSkip's online step besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies.adaskip import AdaSkip
from adaskip_fx.policies.base import for_its_model

if TYPE_CHECKING:
    from adaskip_fx.plans.sublayer import Sublayer
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class Fitted:
    """Skip what `skip_plan` skips; decoding may add the ffn sublayers that it has a surrogate for.

    Attributes:
        skip_plan: as :func:`adaskip_fx.fit` or ``adaskip-fx fit`` made it; it was made for one
            alpha already, so `plan` ignores its `alpha`.
        base: its window and rule say which ffn sublayers are similar enough.
    """

    skip_plan: SkipPlan
    base: AdaSkip = field(default_factory=AdaSkip)

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return `skip_plan`, whatever `alpha` is.

        Raises:
            ValueError: the profile is of other sublayers.
        """
        self.base.threshold(profile, self.skip_plan)
        return self.skip_plan

    @property
    def online(self) -> bool:
        """Whether there is anything that decoding may add."""
        return self.base.online and bool(self.extras)

    @property
    def window(self) -> int:
        """Decoded tokens to measure before it decides."""
        return self.base.window

    @property
    def extras(self) -> tuple[Sublayer, ...]:
        """The ffn sublayers that run and have a surrogate."""
        known = self.skip_plan.surrogates.by_sublayer
        return tuple(s for s in known if s.kind == "ffn" and s not in self.skip_plan.decode)

    def online_plan(
        self,
        profile: Profile,
        plan: SkipPlan,
        window: npt.ArrayLike,
        probed: Sequence[Sublayer],
    ) -> SkipPlan:
        """Return what :meth:`AdaSkip.online_plan` does, for sublayers with a surrogate alone.

        Args:
            profile: what calibration measured on the model.
            plan: the plan so far.
            window: [len(probed), 5], sums of `PROBE_STATS` over the tokens of the window.
            probed: the ffn sublayers that were measured.
        """
        allowed = [i for i, s in enumerate(probed) if s in self.extras]
        rows = np.asarray(window, dtype=np.float64)[allowed]
        return self.base.online_plan(profile, plan, rows, tuple(probed[i] for i in allowed))
