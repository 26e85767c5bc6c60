"""LLM-Drop (arXiv 2406.15786): the sublayers whose output is most like their input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from adaskip_fx.policies.adaskip import skip_count
from adaskip_fx.policies.base import for_its_model, plan_without

if TYPE_CHECKING:
    from adaskip_fx.plans.skip_plan import SkipPlan
    from adaskip_fx.profiles.profile import Profile

Which = Literal["attention", "joint"]


@dataclass(frozen=True)
class LLMDrop:
    """Rank by similarity; nothing is learned while decoding.

    Attributes:
        which: rank `"attention"` sublayers alone (the paper's advice), or `"joint"`, attention and
            ffn in one ranking, which is AdaSkip's offline step.
        scaled: whether a skipped sublayer becomes AdaSkip's `scale * x` instead of `x`.

    Raises:
        ValueError: another `which`.
    """

    which: Which = "attention"
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.which not in get_args(Which):
            raise ValueError(f"which must be 'attention' or 'joint', got {self.which!r}")

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return the plan that skips the `skip_count(alpha, S)` most similar sublayers.

        Ties are broken in stream order.

        Raises:
            ValueError: `skip_count` refuses `alpha`, or it asks for more than all attention.
        """
        sublayers, similarity = profile.sublayers, profile.similarity()
        count = skip_count(alpha, len(sublayers))
        ranking = [sublayers[i] for i in np.argsort(-similarity, kind="stable")]
        if self.which == "attention":
            ranking = [s for s in ranking if s.kind == "attention"]
        if count > len(ranking):
            raise ValueError(
                f"alpha {alpha} skips {count} sublayers, but the model has {len(ranking)} of "
                "attention: take a smaller alpha, or LLMDrop('joint')"
            )
        return plan_without(profile, ranking[:count], self.scaled)
