"""Weaker plans for drafts that spend their bound of divergence too fast, and which one is due.

A frontier is a sequence of plans of which each leaves out less than the one before: as far as
nothing else is known, half as much, the most important first to run again. All of them run on the
same cache and pieces, so the next plan is a link.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..plans.decisions import left_out
from ..plans.skip_plan import SkipPlan
from ..plans.sublayer import Sublayer
from ..plans.windows import NO_WINDOWS
from .divergence import Spent

#: Tokens for which what is left must do, or a weaker plan is taken; also how long one stays.
_AHEAD = 32
_DECAY = 0.8  # of what a plan's drafts have cost, at each new block
_SUPPOSED = 8.0  # drafts that a plan is supposed to have had before, each of which cost the bound


def weaker_plans(plan: SkipPlan, similarity: Mapping[Sublayer, float]) -> tuple[SkipPlan, ...]:
    """Return plans that leave out less and less of `plan`, each weaker than the one before.

    Of n sublayers that it does not simply run in decode, n // 2, n // 4, ... 1 are left: those
    whose residual stream before and after is most similar, as a policy would choose them. Windows
    stay, and if there are any the last plan has these alone.

    Args:
        plan: the strongest one, which is not among those that are returned.
        similarity: of each sublayer that `plan` leaves out (``Profile.similarity``).
    """
    ranking = sorted(plan.decode, key=lambda s: (-similarity[s], s))
    counts = [len(ranking) >> i for i in range(1, len(ranking).bit_length())]
    counts += [0] if ranking and plan.windows.decode else []
    return tuple(_restricted(plan, ranking[:count]) for count in counts)


def _restricted(plan: SkipPlan, kept: Sequence[Sublayer]) -> SkipPlan:
    """Return the plan that leaves out `kept` alone of what `plan` does."""
    wanted = frozenset(kept)
    prefill, decode = (
        {s: action for s, action in actions.items() if s in wanted}
        for actions in (plan.prefill, plan.decode)
    )
    return replace(plan, prefill=prefill, decode=decode)


def check_weaker(plans: Sequence[SkipPlan]) -> None:
    """See that each plan leaves out less in decode than the one before.

    Raises:
        ValueError: one does not.
        PlanError: they are for different models.
    """
    for stronger, weaker in pairwise(map(_decoding, plans)):
        if not weaker < stronger:
            raise ValueError(
                f"each weaker plan must leave out less than the one before it, and nothing else: "
                f"{left_out(weaker)} after {left_out(stronger)}; sort them, or leave weaker= out"
            )


def _decoding(plan: SkipPlan) -> SkipPlan:
    """Return a plan that does in both phases what `plan` does in decode."""
    windows = replace(plan.windows, prefill=plan.windows.decode) if plan.windows else NO_WINDOWS
    return replace(plan, prefill=plan.decode, windows=windows, last_token_full=False)


class Frontier:
    """Which plan of a frontier one request drafts with.

    Attributes:
        plans: the strongest first.
        level: the place in `plans` of the one that is due.
        weakened: how often a weaker one was taken.
    """

    def __init__(self, plans: Sequence[SkipPlan], most: float) -> None:
        """Begin with the first plan, in a request that may spend `most` nats for each token."""
        self.plans = plans
        self.level = self.weakened = 0
        self._most = most
        self._seen = [_Seen(_SUPPOSED * most, _SUPPOSED) for _ in plans]
        self._since = 0  # tokens since the level was changed

    @property
    def plan(self) -> SkipPlan:
        """The plan that is due."""
        return self.plans[self.level]

    def verified(self, block: Spent, tokens: int) -> bool:
        """Take note of a block that gave `tokens` tokens; returns whether another plan is due.

        A weaker one is where drafts cost more than the bound and one was beyond it, or would be
        before `_AHEAD` more tokens; a stronger one where what is left pays so many of its own.
        """
        self._seen[self.level].add(block.nats, block.drafts)
        self._since += tokens
        excess = self._seen[self.level].rate - self._most
        if excess > 0 and (block.refused or block.left < _AHEAD * excess):
            step = int(self.level + 1 < len(self.plans))
            self.weakened += step
        else:
            step = -int(self.level > 0 and self._since >= _AHEAD and self._pays(block.left))
        self.level += step
        self._since = 0 if step else self._since
        return step != 0

    def _pays(self, left: float) -> bool:
        """Return whether so many nats are enough for the next stronger plan."""
        return left >= _AHEAD * (self._seen[self.level - 1].rate - self._most)


@dataclass
class _Seen:
    """What the drafts of one plan have cost, those of earlier blocks less and less."""

    nats: float
    drafts: float

    @property
    def rate(self) -> float:
        return self.nats / self.drafts

    def add(self, nats: float, drafts: int) -> None:
        self.nats = _DECAY * self.nats + nats
        self.drafts = _DECAY * self.drafts + drafts
