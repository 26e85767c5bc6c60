"""The plans of a turn's decode steps, and the window in which they are learned.

FFN sublayers are measured over a turn's first decoded tokens; then the policy decides which of them
the rest of the turn skips (AdaSkip, arXiv 2501.02336, section 3.3). Readings stay on the device and
are added up there; the host reads them once, when the window closes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..kv_cache.retention import widened
from ..parallel.ranks import Ranks
from ..plans.decisions import Schedule, plans_of
from ..plans.skip_plan import Action, PlanError, SkipPlan
from ..plans.sublayer import Sublayer

if TYPE_CHECKING:
    from ..policies import OnlinePolicy
    from ..profiles.profile import Profile


@dataclass
class Window:
    """The readings of one turn's decode window.

    Attributes:
        probed: The FFN sublayers that run and are measured.
        size: How many tokens to measure (the paper's P).
        steps: How many tokens have been measured.
        statistics: Their sums [probed, B, 5], float64, on the model's device; None at first.
    """

    probed: tuple[Sublayer, ...]
    size: int
    steps: int = 0
    statistics: torch.Tensor | None = None

    @property
    def closed(self) -> bool:
        """Whether all tokens of the window have been measured."""
        return self.steps >= self.size

    def add(self, reading: torch.Tensor) -> None:
        """Count the similarity statistics [probed, B, 5] of one step."""
        wide = reading.to(torch.float64)
        self.statistics = wide if self.statistics is None else self.statistics + wide
        self.steps += 1

    def of_rows(self, rows: torch.Tensor) -> Window:
        """Return the readings of other rows, int64 [B']: the old row of each new one."""
        if self.statistics is None:
            return replace(self)
        return replace(
            self, statistics=self.statistics.index_select(1, rows.to(self.statistics.device))
        )

    def read(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the sums over the rows of the batch [probed, 5]; the host waits for the device."""
        if self.statistics is None:
            raise ValueError("nothing was measured in this window yet")
        return self.statistics.sum(1).cpu().numpy()


@dataclass(frozen=True)
class Learner:
    """What a turn learns with.

    Attributes:
        policy: It decides once the window has closed.
        profile: What calibration measured.
        unskippable: Sublayers that cannot be skipped, and are not measured.
        ranks: The processes that learn together; the first decides.
    """

    policy: OnlinePolicy
    profile: Profile
    unskippable: frozenset[Sublayer] = frozenset()
    ranks: Ranks = field(default_factory=Ranks, compare=False, repr=False)

    def open(self, plan: SkipPlan) -> Window | None:
        """Return a window for a turn that begins with `plan`; None if nothing can be learned.

        That is so where the policy does not learn, where prefill skips nothing to compare with, and
        where no FFN sublayer runs.
        """
        if not self.policy.online or not plan.skipped("prefill"):
            return None
        probed = tuple(s for s in probed_in_decode(plan) if s not in self.unskippable)
        return Window(probed, self.policy.window) if probed else None

    def decide(self, plan: SkipPlan, window: Window) -> SkipPlan:
        """Return the plan for the rest of a turn that began with `plan`.

        Raises:
            PlanError: It widens a window: what that shows more is not held.
        """
        sums = window.read()
        decided = self.ranks.first(
            "the plan of a window",
            lambda: self.policy.online_plan(self.profile, plan, sums, window.probed),
        )
        wider = widened((plan,), decided)
        if wider is not None:
            raise PlanError(
                f"{type(self.policy).__name__} decided on a plan with which {wider} sees more than "
                "under the request's own; it may only leave out more"
            )
        return decided


@dataclass
class DecodePlans:
    """Which plan each decode step of one turn runs with.

    Attributes:
        decision: What the turn began with.
        plan: The plan of the last step, or of the first if there was none yet.
        window: The decode window; None where nothing is measured.
    """

    decision: SkipPlan | Schedule
    plan: SkipPlan = field(init=False)
    window: Window | None = field(init=False, default=None)
    _learner: Learner | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.plan = plans_of(self.decision)[0]

    def learn_with(self, learner: Learner | None) -> None:
        """Open a window, if there is anything to learn: nothing is beside a schedule."""
        if learner is not None and isinstance(self.decision, SkipPlan):
            self._learner, self.window = learner, learner.open(self.decision)

    @property
    def learning(self) -> bool:
        """Whether the next step is measured."""
        return self.window is not None and not self.window.closed

    @property
    def probed(self) -> tuple[Sublayer, ...]:
        """The sublayers that the next step measures."""
        return self.window.probed if self.window is not None and self.learning else ()

    def at(self, step: int) -> SkipPlan:
        """Return the plan of decode step `step` of the turn, counted from 0."""
        if isinstance(self.decision, Schedule):
            self.plan = self.decision.at(step)
        return self.plan

    def learn(self, reading: torch.Tensor) -> None:
        """Count the statistics [probed, B, 5] of a step; decide at the end of the window."""
        if self.window is None:
            raise ValueError("this turn measures nothing")
        self.window.add(reading)
        learner = self._learner if self.window.closed else None
        if learner is not None and isinstance(self.decision, SkipPlan):
            self.plan = learner.decide(self.decision, self.window)

    def copy(self) -> DecodePlans:
        """Return the same state for a second request with the same past."""
        twin = replace(self)
        twin.plan, twin._learner = self.plan, self._learner
        twin.window = replace(self.window) if self.window is not None else None
        return twin


def probed_in_decode(plan: SkipPlan) -> tuple[Sublayer, ...]:
    """Return the FFN sublayers that a plan still runs while decoding."""
    return tuple(
        s for s in plan.sublayers if s.kind == "ffn" and plan.action("decode", s) is Action.RUN
    )
