"""Policies that skip in one phase only: POP in prompts, DecodeOnly while decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaskip_fx.plans.decisions import map_plans
from adaskip_fx.plans.phase_split import decode_only, prefill_only
from adaskip_fx.policies.adaskip import AdaSkip
from adaskip_fx.policies.base import check_policy, for_its_model
from adaskip_fx.policies.layer_baselines import EarlyExit

if TYPE_CHECKING:
    from adaskip_fx.plans.decisions import Decision
    from adaskip_fx.plans.skip_plan import SkipPlan
    from adaskip_fx.policies import PlanPolicy, Policy
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class POP:
    """Skip in prompts only, and decode in full (POP, arXiv 2602.03295).

    What another policy skips is left out of prompts; its K/V is still written, computed from the
    stream as it is there: of such a sublayer the norm and the projections alone run.

    Attributes:
        policy: chooses what prompts leave out; by default the last layers, which is what the
            paper's measure (it needs gradients) finds needless in prompts.
        decode_alpha: acceleration ratio of decoding, by the same policy; at 1.0 decoding runs in
            full, as in the paper.
        last_token_full: whether a prompt's last token runs as in decode, as in the paper.
    """

    policy: PlanPolicy = field(default_factory=EarlyExit)
    decode_alpha: float = 1.0
    last_token_full: bool = True

    def check(self, model: Any) -> None:
        """Refuse a model that `policy` refuses."""
        check_policy(self.policy, model)

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return `policy`'s plan at `alpha` for prompts, and at `decode_alpha` for decoding.

        Raises:
            ValueError: the policy refuses a ratio, or decoding would leave out more than prompts.
        """
        smaller = self.policy.plan(profile, self.decode_alpha)
        return prefill_only(
            self.policy.plan(profile, alpha), smaller, last_token_full=self.last_token_full
        )


@dataclass(frozen=True)
class DecodeOnly:
    """Skip only while decoding: prompts run in full, as in Unified Layer Skipping and SkipDecode.

    The cache is the full model's: what is left out still writes its K/V. Nothing is learned online.

    Attributes:
        policy: decides what decoding leaves out.
    """

    policy: Policy = field(default_factory=AdaSkip)

    def check(self, model: Any) -> None:
        """Refuse a model that `policy` refuses."""
        check_policy(self.policy, model)

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> Decision:
        """Return `policy`'s decision at `alpha` with every prompt in full.

        Raises:
            ValueError: as `policy` does.
        """
        return map_plans(self.policy.plan(profile, alpha), decode_only)
