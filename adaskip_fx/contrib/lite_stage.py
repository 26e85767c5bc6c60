"""LiteStage (arXiv 2510.14211): a plan per stage, chosen by measured time under a bound of loss.

A compiled model runs one plan until it is told another::

    plans = LiteStage(stages).plans(profile, alpha=1.5)
    fast = adaskip_fx.compile(model, plan=plans["recall"])
    ...
    fast.adaskip.plan = plans["answer"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..plans.skip_plan import SkipPlan
from ..policies.adaskip import skip_count
from ..policies.base import plan_without

if TYPE_CHECKING:
    from ..profiles.profile import Profile


@dataclass(frozen=True)
class Stage:
    """One stage of a task that asks the model several times.

    Attributes:
        name: A word for it, such as recall, reason, answer.
        latency: Seconds that the stage takes under a plan, all its tokens included: a plan that is
            quicker for each token may make the model write more of them.
        accuracy: How good the task's result is under a plan of this stage; the more the better.
        profile: What was measured on the stage's own prompts; None for that of `LiteStage.plans`.
    """

    name: str
    latency: Callable[[SkipPlan], float]
    accuracy: Callable[[SkipPlan], float]
    profile: Profile | None = None


@dataclass(frozen=True)
class LiteStage:
    """For each stage, of the most similar sublayers as many as make it quickest within the bound.

    Budgets are tried from none upwards in each stage's own ranking of attention and ffn, and no
    larger one after one that broke the bound. The authors' early end of generation is
    `adaskip_fx.contrib.stopping.ConfidenceStop`.

    Attributes:
        stages: At least one, each with a name of its own.
        bound: The accuracy that a stage may lose against its full model.
        stride: How many more sublayers each budget skips than the one before.
        scaled: Whether a skipped sublayer becomes AdaSkip's `scale * x` (eq. 4); not the authors'.

    Raises:
        ValueError: There are no stages, two have one name, the bound is negative or the stride
            below 1.
    """

    stages: tuple[Stage, ...]
    bound: float = 0.04
    stride: int = 1
    scaled: bool = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("LiteStage: no stages were given")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("LiteStage: two stages have one name; give every stage its own")
        if not self.bound >= 0 or self.stride < 1:
            raise ValueError(
                f"LiteStage: bound must be at least 0 and stride at least 1, got {self.bound!r} "
                f"and {self.stride!r}"
            )

    def plans(self, profile: Profile, alpha: float) -> dict[str, SkipPlan]:
        """Return the plan of each stage by its name.

        Args:
            profile: What was measured, for stages without a profile of their own.
            alpha: The most that a stage may skip, as an acceleration ratio.

        Raises:
            ValueError: `skip_count` refuses `alpha`.
        """
        return {s.name: self._quickest(s, s.profile or profile, alpha) for s in self.stages}

    def _quickest(self, stage: Stage, profile: Profile, alpha: float) -> SkipPlan:
        full = plan_without(profile, (), False)
        least = stage.accuracy(full) - self.bound
        best, seconds = full, stage.latency(full)
        for plan in self._budgets(profile, skip_count(alpha, len(profile.sublayers))):
            if not stage.accuracy(plan) >= least:
                break
            taken = stage.latency(plan)
            if taken < seconds:
                best, seconds = plan, taken
        return best.with_fingerprint(profile.fingerprint)

    def _budgets(self, profile: Profile, most: int) -> Iterator[SkipPlan]:
        order = np.argsort(-profile.similarity(), kind="stable")
        ranking = [profile.sublayers[i] for i in order]
        for count in range(self.stride, most + 1, self.stride):
            yield plan_without(profile, ranking[:count], self.scaled)
