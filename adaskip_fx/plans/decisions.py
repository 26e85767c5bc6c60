"""What a policy decides: one plan, a schedule of plans, a choice among plans, or one per stage."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.tables import by_kind
from adaskip_fx.utils.files import canonical_digest

__all__ = ["Choice", "Decision", "Option", "Schedule", "Stages"]


class _Plans(ABC):
    """What decisions of several plans share: their sublayers, a file form, a printed form."""

    kind: ClassVar[str] = ""

    @property
    @abstractmethod
    def plans(self) -> tuple[SkipPlan, ...]:
        """Every plan, in order."""

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Every sublayer of the model, in stream order."""
        return self.plans[0].sublayers


@dataclass(frozen=True)
class Schedule(_Plans):
    """Decode plans that change as a turn gets longer; prompts run the same whatever the step.

    steps: pairs of the first decode step of a plan (0: the first new token fed back) and the plan.
        Steps are counted anew in every turn of a request.

    The cache stays whole: attention that prompts run and some step skips is `kv_only` in that step.
    The stream is as if it were skipped, and its K/V is there for the next turn.

    PlanError: no steps, not from 0 or not rising; plans of different models, or whose prompts
    differ in what runs, in surrogates or in `last_token_full`.
    """

    steps: tuple[tuple[int, SkipPlan], ...]
    kind: ClassVar[str] = "schedule"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple((step, plan) for step, plan in self.steps))
        firsts = [step for step, _ in self.steps]
        rising = all(a < b for a, b in pairwise(firsts))
        if not firsts or firsts[0] != 0 or not rising:
            raise PlanError(f"the steps of a schedule rise from 0, got {firsts}")
        _check_same_model(self.kind, self.plans)
        for step, plan in self.steps:
            _check_same_prompts(step, self.plans[0], plan)

    @property
    def plans(self) -> tuple[SkipPlan, ...]:
        return tuple(plan for _, plan in self.steps)

    def at(self, step: int) -> SkipPlan:
        """The plan of decode step `step`, counted from 0 in each turn."""
        return self.steps[max(0, bisect_right(self._firsts, step) - 1)][1]

    @cached_property
    def _firsts(self) -> list[int]:
        return [step for step, _ in self.steps]

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the steps and their plans."""
        return canonical_digest([[step, plan.digest] for step, plan in self.steps])

    def __str__(self) -> str:
        """A heading, one row per step and, of prompts, what they skip; plain text."""
        first, total = self.plans[0], len(self.sublayers)
        heading = (
            f"Schedule {self.digest[:8]}: {len(self.steps)} decode plans of {total} sublayers; "
            f"prefill skips {len(first.skipped('prefill'))}"
        )
        return "\n".join(
            [heading, *(f"from token {step}: {left_out(p)}" for step, p in self.steps)]
        )


@dataclass(frozen=True)
class Option:
    """One of the plans of a `Choice`, and where in the space of prompts it belongs.

    centroid: [hidden], the mean input embedding of prompts that the plan is for; only its direction
        counts.

    PlanError: the centroid is empty, zero or not finite.
    """

    name: str
    plan: SkipPlan
    centroid: tuple[float, ...]

    def __post_init__(self) -> None:
        centroid = tuple(map(float, self.centroid))
        object.__setattr__(self, "centroid", centroid)
        if not (all(map(math.isfinite, centroid)) and any(centroid)):
            raise PlanError(f"option {self.name}: a centroid is finite and not zero")


@dataclass(frozen=True)
class Choice(_Plans):
    """A few plans, of which a request takes one by its first prompt and keeps it.

    The one whose centroid makes the smallest angle with the mean input embedding of the prompt's
    tokens, padding left out; ties go to the first. A batch takes one plan: the mean is over rows,
    each row counting the same.

    PlanError: no options, a name used twice, plans of different models, centroids of other widths.
    """

    options: tuple[Option, ...]
    kind: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        _check_names(self.kind, [option.name for option in self.options])
        _check_same_model(self.kind, self.plans)
        widths = {len(option.centroid) for option in self.options}
        if len(widths) > 1:
            raise PlanError(f"the centroids of a choice have different widths: {sorted(widths)}")

    @property
    def plans(self) -> tuple[SkipPlan, ...]:
        return tuple(option.plan for option in self.options)

    def nearest(self, embedding: npt.ArrayLike) -> Option:
        """The option for a prompt with mean input embedding `embedding` [hidden].

        ValueError for another width: the choice was made for another model.
        """
        prompt = np.asarray(embedding, dtype=np.float64)
        centroids = np.array([option.centroid for option in self.options])
        if prompt.shape != centroids.shape[1:]:
            raise ValueError(
                f"the prompt's embedding has shape {list(prompt.shape)}, the centroids are "
                f"{centroids.shape[1]} wide: this choice was made for another model"
            )
        cosine = centroids @ prompt / np.linalg.norm(centroids, axis=1)  # times the prompt's norm
        return self.options[int(np.argmax(cosine))]

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the options."""
        return canonical_digest([[o.name, o.plan.digest, list(o.centroid)] for o in self.options])

    def __str__(self) -> str:
        """A heading and one row per option, plain text."""
        heading = f"Choice {self.digest[:8]}: {len(self.options)} plans, one by the first prompt"
        return "\n".join([heading, *(f"{o.name}: {left_out(o.plan)}" for o in self.options)])


@dataclass(frozen=True)
class Stages(_Plans):
    """A plan for each stage of a task that asks the model several times (recall, reason, answer).

    stages: pairs of a name and a plan. A compiled model runs the stage that its
        `adaskip.stage` names.

    PlanError: no stages, a name used twice, plans of different models.
    """

    stages: tuple[tuple[str, SkipPlan], ...]
    kind: ClassVar[str] = "plan per stage"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple((name, plan) for name, plan in self.stages))
        _check_names(self.kind, [name for name, _ in self.stages])
        _check_same_model(self.kind, self.plans)

    @property
    def plans(self) -> tuple[SkipPlan, ...]:
        return tuple(plan for _, plan in self.stages)

    def plan(self, name: str | None) -> SkipPlan:
        """The plan of stage `name`; ValueError, naming the stages, where there is none."""
        known = dict(self.stages)
        if name not in known:
            raise ValueError(
                f"stage {name!r}: the plans are for {', '.join(known)}; set the compiled model's "
                "adaskip.stage to one of them"
            )
        return known[name]

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the stages and their plans."""
        return canonical_digest([[name, plan.digest] for name, plan in self.stages])

    def __str__(self) -> str:
        """A heading and one row per stage, plain text."""
        heading = f"Stages {self.digest[:8]}: {len(self.stages)} plans, one for each stage"
        return "\n".join([heading, *(f"{name}: {left_out(plan)}" for name, plan in self.stages)])


Decision: TypeAlias = SkipPlan | Schedule | Choice | Stages


def plans_of(decision: Decision) -> tuple[SkipPlan, ...]:
    """Every plan of a decision; the first is the one that comes first."""
    return (decision,) if isinstance(decision, SkipPlan) else decision.plans


def map_plans(decision: Decision, change: Callable[[SkipPlan], SkipPlan]) -> Decision:
    """The same decision with every plan changed."""
    match decision:
        case SkipPlan():
            return change(decision)
        case Schedule():
            return Schedule(tuple((step, change(plan)) for step, plan in decision.steps))
        case Choice():
            return Choice(tuple(replace(o, plan=change(o.plan)) for o in decision.options))
        case Stages():
            return Stages(tuple((name, change(plan)) for name, plan in decision.stages))


def left_out(plan: SkipPlan) -> str:
    """In one line what decode leaves out, K/V-only sublayers counted in."""
    gone = tuple(plan.decode)
    written = sum(action is Action.KV_ONLY for action in plan.decode.values())
    kept = f", {written} of them with their K/V written" if written else ""
    which = f": {by_kind(gone)}" if gone else ""
    return f"decode leaves out {len(gone)} of {len(plan.sublayers)}{kept}{which}"


# Validation ------------------------------------------------------------------------------------


def _check_names(kind: str, names: Sequence[str]) -> None:
    if not names:
        raise PlanError(f"a {kind} needs at least one plan, got none")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise PlanError(f"a {kind} names {twice[0]!r} twice; give every plan its own name")


def _check_same_model(kind: str, plans: Iterable[SkipPlan]) -> None:
    if len({plan.sublayers for plan in plans}) > 1:
        raise PlanError(f"the plans of a {kind} are for different models: their sublayers differ")


def _check_same_prompts(step: int, first: SkipPlan, plan: SkipPlan) -> None:
    for sublayer in first.sublayers:
        expected, got = first.action("prefill", sublayer), plan.action("prefill", sublayer)
        if expected is not got:
            raise PlanError(
                f"step {step}: {sublayer} is {got} in prefill, but {expected} from step 0 on; a "
                "schedule changes decode only"
            )
    if first.phase_digest("prefill") != plan.phase_digest("prefill"):
        raise PlanError(f"step {step}: what prefill skips has other surrogates than at step 0")
    if first.last_token_full != plan.last_token_full:
        raise PlanError(f"step {step}: last_token_full is not as at step 0")
