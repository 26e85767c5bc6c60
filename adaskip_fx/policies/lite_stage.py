"""LiteStage (arXiv 2510.14211): a plan per stage, chosen by measured time under a bound of loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adaskip_fx.plans.decisions import Stages
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies.adaskip import skip_count
from adaskip_fx.policies.base import plan_without

if TYPE_CHECKING:
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class Stage:
    """One stage of a task that asks the model several times.

    name: such as recall, reason, answer.
    latency: seconds that the stage takes under a plan, all its tokens included: a plan that is
        quicker for each token may make the model write more of them.
    accuracy: how good the task's result is under a plan of this stage; the more the better.
    profile: what was measured on the stage's own prompts; None: what the policy is handed.
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

    stages: at least one.
    bound: accuracy that a stage may lose against its full model.
    stride: sublayers more from one budget to the next.
    scaled: whether a skipped sublayer becomes AdaSkip's `scale * x` (eq. 4); not the authors'.

    ValueError for no stages, a negative bound or a stride below 1.
    """

    stages: tuple[Stage, ...]
    bound: float = 0.04
    stride: int = 1
    scaled: bool = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("LiteStage: no stages were given")
        if not self.bound >= 0 or self.stride < 1:
            raise ValueError(
                f"LiteStage: bound must be at least 0 and stride at least 1, got {self.bound!r} "
                f"and {self.stride!r}"
            )

    def plan(self, profile: Profile, alpha: float) -> Stages:
        """A plan per stage; `alpha` is the most that a stage may skip.

        ValueError for an `alpha` that `skip_count` refuses.
        """
        return Stages(
            tuple((s.name, self._quickest(s, s.profile or profile, alpha)) for s in self.stages)
        )

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
        return best

    def _budgets(self, profile: Profile, most: int) -> Iterator[SkipPlan]:
        order = np.argsort(-profile.similarity(), kind="stable")
        ranking = [profile.sublayers[i] for i in order]
        for count in range(self.stride, most + 1, self.stride):
            yield plan_without(profile, ranking[:count], self.scaled)
