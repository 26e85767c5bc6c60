"""What a compiled model really ran, read from the graphs of the programs that it called.

A number for a model that skips is worth nothing if it did not skip. So every step of an evaluation
is watched: the sublayers that its program calls are compared with the plan in force, and counted,
prompts and decode steps apart. The plan is never taken for what happened. And a plan that changes
only steps which a task does not run is not what the task measured: that is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

from adaskip_fx.plans.decisions import PlanChooser, plans_of
from adaskip_fx.plans.skip_plan import Action, Phase, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.programs.program import Program
from adaskip_fx.programs.rewrite import plan_phase
from adaskip_fx.runtime.runtime import Runtime
from adaskip_fx.utils.files import JSON
from adaskip_passes.errors import AdaskipError

#: See `Runtime.observer`.
Observer = Callable[[Program, SkipPlan, int], None]


class SkipPathError(AdaskipError, RuntimeError):
    """A compiled model ran other sublayers than its plan says, or was not run at all."""


class NotMeasuredError(AdaskipError, ValueError):
    """What ran was the full model: no step was of a kind that the plan changes."""


@dataclass(frozen=True)
class PhaseRan:
    """What ran in one phase of an evaluation.

    Attributes:
        steps: calls of the model.
        tokens: rows times tokens, over all steps.
        ran: for each sublayer of the model how many tokens went through it.
        windowed: for how many of them its attention saw a window; none of those that are missing.
    """

    steps: int
    tokens: int
    ran: Mapping[Sublayer, int]
    windowed: Mapping[Sublayer, int] = field(default_factory=dict)

    @property
    def fraction(self) -> float | None:
        """The share of all sublayers, over all tokens, that was left out; None without a token.

        A sublayer of which only K/V is written counts as left out.
        """
        if not self.tokens:
            return None
        every = self.tokens * len(self.ran)
        return (every - sum(self.ran.values())) / every

    def to_json(self) -> dict[str, JSON]:
        """Return counts, the fraction, and how often each sublayer was left out."""
        windowed: dict[str, JSON] = {str(s): n for s, n in self.windowed.items()}
        left_out = {str(s): self.tokens - n for s, n in self.ran.items() if n < self.tokens}
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "skipped_fraction": self.fraction,
            "tokens_skipped": left_out,
            **({"tokens_windowed": windowed} if windowed else {}),
        }


@dataclass(frozen=True)
class Ran:
    """What ran in an evaluation of a compiled model.

    Attributes:
        prefill: what ran in prompts, those that continue a request as well.
        decode: what ran in steps of one token; the last token of a prompt that runs as in decode
            counts as one.
        plans: digests of the plans in force, in the order in which they came up.
    """

    prefill: PhaseRan
    decode: PhaseRan
    plans: tuple[str, ...]

    def to_json(self) -> dict[str, JSON]:
        """Return both phases, and the plans."""
        phases = {"prefill": self.prefill.to_json(), "decode": self.decode.to_json()}
        return {**phases, "plans": list(self.plans)}


@dataclass
class Watch:
    """Counts the steps of one compiled model and refuses those that do not follow the plan.

    Attributes:
        runtime: the compiled model's.
    """

    runtime: Runtime
    _steps: Counter[Phase] = field(default_factory=Counter)
    _tokens: Counter[Phase] = field(default_factory=Counter)
    _ran: dict[Phase, Counter[Sublayer]] = field(
        default_factory=lambda: {phase: Counter() for phase in get_args(Phase)}
    )
    _windowed: dict[Phase, Counter[Sublayer]] = field(
        default_factory=lambda: {phase: Counter() for phase in get_args(Phase)}
    )
    _plans: dict[str, SkipPlan] = field(default_factory=dict)

    def __call__(self, program: Program, plan: SkipPlan, tokens: int) -> None:
        """Count one step; see `Runtime.observer`.

        Raises:
            SkipPathError: the program does not call the sublayers that the plan says, or their
                attention does not see what it says.
        """
        phase = plan_phase(program.captured.key.phase)
        check_followed(plan, phase, program.runs, program.windowed)
        self._steps[phase] += 1
        self._tokens[phase] += tokens
        self._ran[phase].update(dict.fromkeys(program.runs, tokens))
        self._windowed[phase].update(dict.fromkeys(program.windowed, tokens))
        self._plans[plan.digest] = plan

    @property
    def plans(self) -> tuple[SkipPlan, ...]:
        """The plans that were in force, in the order in which they came up."""
        return tuple(self._plans.values())

    def read(self) -> Ran:
        """Return what has run so far.

        Raises:
            SkipPathError: nothing has run.
        """
        if not self._steps:
            raise SkipPathError(
                "no step of the compiled model was seen, so what was measured was not measured "
                "on it; call the compiled model itself, not the model that it was made from"
            )
        return Ran(self._phase("prefill"), self._phase("decode"), tuple(self._plans))

    def check_measured(self, what: str) -> None:
        """Refuse what ran if it was the full model, though the plan leaves out or hides something.

        In a choice among plans only those count that were chosen.

        Args:
            what: what was asked, for the message.

        Raises:
            NotMeasuredError: says what ran, and in which steps the plan would have left out what.
        """
        phases = get_args(Phase)
        ran = {phase: self._phase(phase) for phase in phases}
        if not self._steps or any(r.fraction or r.windowed for r in ran.values()):
            return
        decision = self.runtime.plan
        chosen = self._plans.values() if isinstance(decision, PlanChooser) else None
        plans = tuple(chosen) if chosen is not None else plans_of(decision)
        meant = {phase: _left_out(plans, phase) for phase in phases}
        parts = [
            f"{', '.join(map(str, skips))} in {phase}" for phase, skips in meant.items() if skips
        ]
        if parts:
            prompts, steps = (ran[phase].steps for phase in phases)
            verb = "leaves out or narrows" if any(p.windows for p in plans) else "leaves out"
            raise NotMeasuredError(
                f"{what} ran {prompts} prompts and {steps} decode steps, and nothing was left out "
                f"in any of them: the plan {verb} {' and '.join(parts)}. What was "
                "measured is the full model. Choose a task that runs such steps (one that "
                "generates its answers, or decode_perplexity), or another plan"
            )

    def _phase(self, phase: Phase) -> PhaseRan:
        ran = {s: self._ran[phase][s] for s in self.runtime.sublayers}
        windowed = dict(sorted(self._windowed[phase].items()))
        return PhaseRan(self._steps[phase], self._tokens[phase], ran, windowed)


def _left_out(plans: Iterable[SkipPlan], phase: Phase) -> list[Sublayer]:
    """Return what any of these plans does not run, or not in full, in `phase`."""
    found = ({**getattr(plan, phase), **plan.windows.of_phase(phase)} for plan in plans)
    return sorted({sublayer for changed in found for sublayer in changed})


def check_followed(
    plan: SkipPlan,
    phase: Phase,
    runs: frozenset[Sublayer],
    windowed: frozenset[Sublayer] = frozenset(),
) -> None:
    """Refuse a program of `phase` that calls `runs` under `plan`, unless these are its sublayers.

    Args:
        plan: what should have run.
        phase: of the program.
        runs: the sublayers that the program calls.
        windowed: those of them whose attention sees a window.

    Raises:
        SkipPathError: names what ran and should not have, or the other way round.
    """
    wanted = {s for s in plan.sublayers if plan.action(phase, s) is Action.RUN}
    seen = frozenset(plan.windows.of_phase(phase))
    if runs == wanted and windowed == seen:
        return
    if runs == wanted:
        differ = ", ".join(map(str, sorted(windowed ^ seen)))
        raise SkipPathError(
            f"plan {plan.digest[:8]} has windows in {len(seen)} sublayers in {phase}, but the "
            f"program that was used in {len(windowed)}: they differ in {differ}. What was measured "
            "is not this plan; this is a fault of adaskip_fx, please report it with the plan"
        )
    head = (
        f"plan {plan.digest[:8]} runs {len(wanted)} of {len(plan.sublayers)} sublayers in {phase}, "
        f"but the program that was used runs {len(runs)}"
    )
    extra, missing = (sorted(map(str, s)) for s in (runs - wanted, wanted - runs))
    parts = [f"{', '.join(extra)} should have been left out"] if extra else []
    parts += [f"{', '.join(missing)} should have been run"] if missing else []
    raise SkipPathError(
        f"{head}: {'; '.join(parts)}. What was measured is not this plan; this is a fault of "
        "adaskip_fx, please report it with the plan"
    )


@contextmanager
def watched(model: Any) -> Iterator[Watch | None]:
    """Watch a compiled model's steps inside of the block.

    A watch that is in place already goes on.

    Args:
        model: compiled or not.

    Yields:
        The watch; None for a model that is not compiled.
    """
    runtime = getattr(model, "_adaskip", None)
    if not isinstance(runtime, Runtime):
        yield None
        return
    before, watch = runtime.observer, Watch(runtime)
    runtime.observer = watch if before is None else _both(before, watch)
    try:
        yield watch
    finally:
        runtime.observer = before


def _both(first: Observer, second: Observer) -> Observer:
    def observer(program: Program, plan: SkipPlan, tokens: int) -> None:
        first(program, plan, tokens)
        second(program, plan, tokens)

    return observer
