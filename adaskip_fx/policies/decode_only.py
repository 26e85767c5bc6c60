"""Skip only while decoding: prompts run in full, as in Unified Layer Skipping and SkipDecode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaskip_fx.plans.decisions import map_plans
from adaskip_fx.plans.phase_split import decode_only
from adaskip_fx.policies.adaskip import AdaSkip
from adaskip_fx.policies.base import check_policy

if TYPE_CHECKING:
    from adaskip_fx.plans.decisions import Decision
    from adaskip_fx.policies import Policy
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class DecodeOnly:
    """What another policy decides, for decoding alone.

    The cache is the full model's: what is left out still writes its K/V. Nothing is learned online.

    policy: decides what decoding leaves out.
    """

    policy: Policy = field(default_factory=AdaSkip)

    def check(self, model: Any) -> None:
        """Refuse what `policy` refuses."""
        check_policy(self.policy, model)

    def plan(self, profile: Profile, alpha: float) -> Decision:
        """`policy`'s decision at `alpha` with every prompt in full; errors as of `policy`."""
        return map_plans(self.policy.plan(profile, alpha), decode_only)
