"""What a policy decides: one plan, a schedule of decode plans, or a choice by the first prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, TypeVar, cast

from adaskip_fx.plans.fingerprint import Fingerprint
from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.tables import by_kind
from adaskip_fx.utils.files import JSON, canonical_digest

if TYPE_CHECKING:
    import torch

__all__ = ["Decision", "PlanChooser", "PlanSet", "Schedule"]


class PlanSet(ABC):
    """What decisions of several plans share.

    Attributes:
        kind: The word for it in files and messages.
    """

    kind: ClassVar[str] = "set of plans"

    @property
    @abstractmethod
    def plans(self) -> tuple[SkipPlan, ...]:
        """Every plan, in order."""

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Every sublayer of the model, in stream order."""
        return self.plans[0].sublayers

    @property
    def digest(self) -> str:
        """16 hex characters that identify the content."""
        return canonical_digest([self.kind, *(plan.digest for plan in self.plans)])

    def rows(self) -> list[tuple[str, SkipPlan]]:
        """Return each plan with its name in a report."""
        return [(f"plan {number}", plan) for number, plan in enumerate(self.plans, 1)]

    def with_plans(self, plans: Sequence[SkipPlan]) -> Self:
        """Return the same with other plans, in the order of `plans`.

        Raises:
            PlanError: A set of this kind cannot be changed.
        """
        raise PlanError(f"the plans of a {self.kind} cannot be exchanged")

    def to_entries(self) -> list[dict[str, JSON]]:
        """Return what a file says beside each plan, in the order of `plans`.

        Raises:
            PlanError: A set of this kind cannot be saved.
        """
        raise PlanError(f"a {self.kind} cannot be saved; save its plans")

    @classmethod
    def from_entries(cls, entries: Sequence[tuple[SkipPlan, Mapping[str, Any]]]) -> Self:
        """Return what was saved: each plan with its entry.

        Raises:
            AttributeError, KeyError, TypeError, PlanError: The entries are not of this kind.
        """
        raise PlanError(f"a {cls.kind} cannot be loaded; load its plans")


@dataclass(frozen=True)
class Schedule(PlanSet):
    """Decode plans that change as a turn gets longer; prompts run the same whatever the step.

    The cache stays whole: attention that prompts run and some step skips is `kv_only` in that step.
    The stream is as if it were skipped, and its K/V is there for the next turn.

    Attributes:
        steps: Pairs of the first decode step of a plan (0: the first new token fed back) and the
            plan. Steps are counted from 0 in every turn of a request.

    Raises:
        PlanError: There are no steps, they do not begin at 0 or do not rise; the plans are of
            different models, or their prompts differ in what runs, in surrogates or in
            `last_token_full`.
    """

    steps: tuple[tuple[int, SkipPlan], ...]
    kind: ClassVar[str] = "schedule"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple((step, plan) for step, plan in self.steps))
        firsts = [step for step, _ in self.steps]
        rising = all(a < b for a, b in pairwise(firsts))
        if not firsts or firsts[0] != 0 or not rising:
            raise PlanError(f"the steps of a schedule rise from 0, got {firsts}")
        check_same_model(self.kind, self.plans)
        for step, plan in self.steps:
            _check_same_prompts(step, self.plans[0], plan)

    @property
    def plans(self) -> tuple[SkipPlan, ...]:
        """Every plan, in the order of their steps."""
        return tuple(plan for _, plan in self.steps)

    def with_plans(self, plans: Sequence[SkipPlan]) -> Schedule:
        """Return the same steps with other plans."""
        return Schedule(tuple(zip(self._firsts, plans, strict=True)))

    def to_entries(self) -> list[dict[str, JSON]]:
        """Return the first step of each plan."""
        return [{"first_step": step} for step in self._firsts]

    @classmethod
    def from_entries(cls, entries: Sequence[tuple[SkipPlan, Mapping[str, Any]]]) -> Schedule:
        """Return the schedule that was saved."""
        return cls(tuple((entry["first_step"], plan) for plan, entry in entries))

    def rows(self) -> list[tuple[str, SkipPlan]]:
        """Return each plan with the step that it begins at."""
        return [(f"from {step}", plan) for step, plan in self.steps]

    def at(self, step: int) -> SkipPlan:
        """Return the plan of decode step `step`, counted from 0 in each turn."""
        return self.steps[max(0, bisect_right(self._firsts, step) - 1)][1]

    @cached_property
    def _firsts(self) -> list[int]:
        return [step for step, _ in self.steps]

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the steps and their plans."""
        return canonical_digest([[step, plan.digest] for step, plan in self.steps])

    def __str__(self) -> str:
        """Return a heading and one row per step, plain text."""
        first, total = self.plans[0], len(self.sublayers)
        heading = (
            f"Schedule {self.digest[:8]}: {len(self.steps)} decode plans of {total} sublayers; "
            f"prefill skips {len(first.skipped('prefill'))}"
        )
        return "\n".join(
            [heading, *(f"from token {step}: {left_out(p)}" for step, p in self.steps)]
        )


class PlanChooser(PlanSet):
    """Several plans, of which a request takes one by its first prompt and keeps it.

    This is the hook for routers: a subclass with `plans` and `choose` can be compiled (`plan=`),
    set (``fast.adaskip.plan = ...``) and returned by a policy. `with_plans` makes it fit for `POP`;
    a `kind` of its own, `to_entries`, `from_entries` and
    `adaskip_fx.plans.decision_files.register_kind` for files. `adaskip_fx.contrib.routing` has one.
    """

    @abstractmethod
    def choose(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> SkipPlan:
        """Return one of `plans` for a prompt.

        Args:
            model: The compiled model; its embeddings may be used, its forward must not be.
            input_ids: The tokens of the prompt, int64 [B, T]; a batch takes one plan.
            attention_mask: [B, T], 0 at padding; None when there is none.
        """


Decision: TypeAlias = SkipPlan | Schedule | PlanChooser
D = TypeVar("D", bound=Decision)


def plans_of(decision: Decision) -> tuple[SkipPlan, ...]:
    """Return every plan of a decision; the first is the one that comes first."""
    return (decision,) if isinstance(decision, SkipPlan) else decision.plans


def map_plans(decision: Decision, change: Callable[[SkipPlan], SkipPlan]) -> Decision:
    """Return the same decision with every plan changed."""
    if isinstance(decision, SkipPlan):
        return change(decision)
    return decision.with_plans(tuple(map(change, decision.plans)))


def of_model(decision: D, fingerprint: Fingerprint) -> D:
    """Return a decision whose plans say which model they are for; those that do are kept.

    Plans of a choice that cannot be changed are left as they are.
    """
    if all(plan.fingerprint is not None for plan in plans_of(decision)):
        return decision
    try:
        stamped = map_plans(
            decision, lambda plan: plan if plan.fingerprint else plan.with_fingerprint(fingerprint)
        )
        return cast("D", stamped)
    except PlanError:
        return decision


def left_out(plan: SkipPlan) -> str:
    """Return in one line what decode leaves out, K/V-only sublayers counted in."""
    gone = tuple(plan.decode)
    written = sum(action is Action.KV_ONLY for action in plan.decode.values())
    kept = f", {written} of them with their K/V written" if written else ""
    which = f": {by_kind(gone)}" if gone else ""
    windows = plan.windows.decode
    seen = f"; {len(windows)} see a window: {by_kind(windows)}" if windows else ""
    return f"decode leaves out {len(gone)} of {len(plan.sublayers)}{kept}{which}{seen}"


# Validation ------------------------------------------------------------------------------------


def check_same_model(kind: str, plans: Iterable[SkipPlan]) -> None:
    """PlanError for plans whose sublayers differ; `kind` is the word for what they belong to."""
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
    if first.windows.prefill != plan.windows.prefill:
        raise PlanError(f"step {step}: prefill has other windows than at step 0")
    if first.phase_digest("prefill") != plan.phase_digest("prefill"):
        raise PlanError(f"step {step}: what prefill skips has other surrogates than at step 0")
    if first.last_token_full != plan.last_token_full:
        raise PlanError(f"step {step}: last_token_full is not as at step 0")
