"""POP (arXiv 2602.03295): skip in prompts only; decoding runs in full."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaskip_fx.plans.phase_split import prefill_only
from adaskip_fx.policies.base import check_policy
from adaskip_fx.policies.early_exit import EarlyExit

if TYPE_CHECKING:
    from adaskip_fx.plans.skip_plan import SkipPlan
    from adaskip_fx.policies import PlanPolicy
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class POP:
    """What another policy skips is left out of prompts; its K/V is still written.

    K/V of what is left out come from the stream as it is there: norm and projections alone run.

    policy: chooses what prompts leave out; by default the last layers, which is what the paper's
        measure (it needs gradients) finds needless in prompts.
    decode_alpha: acceleration ratio of decoding, by the same policy; 1.0: in full, as in the paper.
    last_token_full: whether a prompt's last token runs as in decode, as in the paper.
    """

    policy: PlanPolicy = field(default_factory=EarlyExit)
    decode_alpha: float = 1.0
    last_token_full: bool = True

    def check(self, model: Any) -> None:
        """Refuse what `policy` refuses."""
        check_policy(self.policy, model)

    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """`policy`'s plan at `alpha` for prompts, and at `decode_alpha` for decoding.

        ValueError for ratios that the policy refuses, or when decoding would leave out more.
        """
        smaller = self.policy.plan(profile, self.decode_alpha)
        return prefill_only(
            self.policy.plan(profile, alpha), smaller, last_token_full=self.last_token_full
        )
