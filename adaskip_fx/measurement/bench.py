"""Time the same prompts and decode steps in several ways, in turns: with and without a plan."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from adaskip_fx.model.handle import runtime_of

from ..plans.decisions import plans_of
from ..plans.skip_plan import Phase, SkipPlan
from ..runtime.runtime import Runtime
from .measure import PHASES, check_contexts
from .timer import EagerTimer, StepTimer

#: Seconds of one prompt of so many tokens, or of one decode step after so many.
Clock = Callable[[Phase, int], float]


@dataclass(frozen=True)
class StepTimes:
    """What one contender took, once in each round.

    Attributes:
        contender: its name.
        phase: whether a prompt or a decode step was timed.
        context: tokens of the prompt, or tokens that are stored after the step.
        seconds: of each round.
    """

    contender: str
    phase: Phase
    context: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds, in seconds."""
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return all of it, with the median, the least and the greatest of the rounds."""
        return {
            "contender": self.contender,
            "phase": self.phase,
            "context": self.context,
            "median": self.median,
            "min": min(self.seconds),
            "max": max(self.seconds),
            "seconds": list(self.seconds),
        }


def time_steps(
    clocks: Mapping[str, Clock],
    contexts: Iterable[int],
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[StepTimes, ...]:
    """Time every contender at every context, in prefill and in decode.

    They take turns, and every other round goes backwards, so that a machine that drifts slows all
    of them. A first round does not count: it compiles and links.

    Args:
        clocks: the contenders by name.
        contexts: tokens of a prompt, and tokens stored after a decode step.
        rounds: how often each is timed.
        progress: called with (rounds done, rounds in all).

    Returns:
        For each phase and context the times of each contender, in the order of `clocks`.
    """
    points = [(phase, context) for phase in PHASES for context in contexts]
    total, done = len(points) * (rounds + 1), 0
    times = []
    for phase, context in points:
        seconds: dict[str, list[float]] = {name: [] for name in clocks}
        for turn in range(rounds + 1):
            if progress is not None:
                progress(done, total)
            for name in reversed(list(clocks)) if turn % 2 else clocks:
                took = clocks[name](phase, context)
                if turn:
                    seconds[name].append(took)
            done += 1
        times += [StepTimes(n, phase, context, tuple(s)) for n, s in seconds.items()]
    if progress is not None:
        progress(total, total)
    return tuple(times)


def plan_clocks(
    compiled: Any, plans: Mapping[str, SkipPlan], batch: int = 1, eager: Any = None
) -> dict[str, Clock]:
    """Return a clock for each plan of a compiled model, and one for a model as it is.

    Args:
        compiled: what ``adaskip_fx.compile`` returned; its own plan does not matter.
        plans: by name.
        batch: rows.
        eager: a transformers model to time first, under the name ``eager``; None for none.
    """
    clocks: dict[str, Clock] = {}
    if eager is not None:
        clocks["eager"] = EagerTimer(eager, batch)
    timer = StepTimer(runtime_of(compiled), batch)
    for name, plan in plans.items():
        clocks[name] = partial(_of_plan, timer, plan)
    return clocks


def _of_plan(timer: StepTimer, plan: SkipPlan, phase: Phase, context: int) -> float:
    return timer(phase, context, plan)


def bench(
    compiled: Any,
    plans: Mapping[str, SkipPlan],
    contexts: Iterable[int],
    *,
    batch: int = 1,
    rounds: int = 5,
    eager: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[StepTimes, ...]:
    """Time prompts and decode steps of a compiled model under several plans.

    Args:
        compiled: see :func:`plan_clocks`.
        plans: see :func:`plan_clocks`.
        contexts: at which to time; sorted, each once.
        batch: rows.
        rounds: how often each plan is timed.
        eager: see :func:`plan_clocks`.
        progress: called with (rounds done, rounds in all).

    Raises:
        ValueError: contexts that the model cannot take, fewer than one round or row.
        PlanError: a plan is of another model.
    """
    runtime = runtime_of(compiled)
    lengths = check_contexts(runtime, contexts, rounds)
    runtime.graphs.check_room(len(plans))
    runtime.warmup(min(lengths), batch)
    clocks = plan_clocks(compiled, plans, batch, eager)
    return time_steps(clocks, lengths, rounds, progress)


@torch.no_grad()
def time_links(runtime: Runtime, count: int) -> tuple[tuple[float, ...], int]:
    """Link several plans that differ from all before, as decode steps do it.

    Each skips one more ffn than the runtime's plan.

    Args:
        runtime: a compiled model's, warmed up.
        count: plans at most.

    Returns:
        Seconds for each, and how many pieces were compiled for all of them.
    """
    plan = plans_of(runtime.plan)[0]
    running = [s for s in plan.sublayers if s not in plan.decode]
    extra = [s for s in running if s.kind == "ffn"][:count] if len(running) > 1 else []
    cache = runtime.new_cache(learn=False)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=runtime.device)
    runtime.step(ids, None, None, cache, 1)
    runtime.step(ids[:, :1], None, None, cache, 1)
    seconds, pieces = [], runtime.pieces_compiled
    for sublayer in extra:
        cache.request.decode_with(plan.with_decode_extra([sublayer]))
        before = runtime.counters.link_seconds
        runtime.step(ids[:, :1], None, None, cache, 1)
        seconds.append(runtime.counters.link_seconds - before)
    return tuple(seconds), runtime.pieces_compiled - pieces
