"""Measure what sublayers cost: time whole steps under a few plans, and solve for the parts.

Sublayers that run the same code (their pieces have equal keys) cost the same, so a plan that
leaves out half of a class says what one of them costs, whatever the depth of the model. What
stands in for a skipped sublayer costs something too, and is measured like a sublayer, by plans
that use it. Plans take turns, round by round, so that a clock that drifts slows all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adaskip_fx.model.handle import runtime_of

from ..latency.table import LatencyTable
from ..latency.terms import Costs, cost_terms
from ..plans.skip_plan import Action, Phase, SkipPlan, Sublayer
from ..plans.surrogates import Surrogates
from ..plans.windows import Window
from ..profiles.fingerprint import fingerprint
from ..runtime.runtime import Runtime
from ..runtime.turns import check_length
from .rank_ladder import rank_ladder
from .timer import StepTimer, conditions
from .window_plans import window_plans

Array = npt.NDArray[np.float64]
TimeStep = Callable[[Phase, int, SkipPlan], float]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
_SHORTEST = 16  # tokens
_GOOD = 0.04


def measure(
    model: Any,
    contexts: Iterable[int],
    *,
    batch: int = 1,
    rounds: int = 5,
    surrogates: Sequence[Surrogates] | None = None,
    kv_only: bool = False,
    ranks: bool = False,
    windows: Sequence[Window] = (),
    time_step: TimeStep | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Measure what each sublayer of a compiled model costs on its device, in prefill and decode.

    Args:
        model: what ``adaskip_fx.compile`` returned; its plan does not matter.
        contexts: tokens of a prompt, and tokens stored at a decode step, at which to measure;
            between them costs are interpolated.
        batch: rows.
        rounds: how often each plan is timed, after once that does not count; up to three times as
            often where times do not add up within 4%, as on a device that others use as well.
        surrogates: for each kind to measure, surrogates of every sublayer; scales if None.
        kv_only: also measure what sublayers cost of which only K/V are written.
        ranks: also measure what low-rank maps of a few ranks, and linear maps, cost.
        windows: also measure what attention costs that has them, in all heads and in some.
        time_step: the clock: seconds of one prompt or step, from (phase, context, plan).
        progress: called with (timed, to be timed).

    Raises:
        ValueError: contexts that cannot be measured, fewer than one round, windows that name heads
            or that no attention can have, or a model that keeps fewer linked programs than are
            timed in turn.
    """
    runtime: Runtime = runtime_of(model)
    lengths = check_contexts(runtime, contexts, rounds)
    runtime.warmup(min(lengths), batch)
    classes = sublayer_classes(runtime)
    if surrogates is None:
        surrogates = (Surrogates.scale(dict.fromkeys(runtime.sublayers, 1.0)),)
    if ranks:
        ladder = rank_ladder(runtime.sublayers, classes, runtime.graphs.structure.width)
        surrogates = (*surrogates, *ladder)
    plans = plans_to_time(runtime.sublayers, classes, surrogates, kv_only)
    heads = runtime.graphs.structure.kv_heads if windows else {}
    plans += window_plans(runtime.sublayers, classes, heads, windows)
    counted = tuple(heads.get(s, 0) for s in runtime.sublayers) if windows else ()
    runtime.graphs.check_room(len(plans))
    clock = time_step or StepTimer(runtime, batch)
    costs = []
    for phase in PHASES:
        for context in lengths:
            counts = [cost_terms(p, phase, runtime.sublayers, classes, counted) for p in plans]
            costs.append(_costs(clock, phase, context, plans, counts, rounds))
            if progress is not None:
                progress(len(costs), len(PHASES) * len(lengths))
    about = fingerprint(runtime.graphs.states.original), conditions(runtime.model, batch)
    return LatencyTable(*about, runtime.sublayers, classes, tuple(costs), counted)


def sublayer_classes(runtime: Runtime) -> tuple[str, ...]:
    """Return the class of each sublayer: its kind, with a number where those of a kind differ.

    The class of a sublayer that cannot be skipped is empty.
    """
    keys = runtime.graphs.keys
    skippable = [s for s in runtime.sublayers if s not in runtime.graphs.structure.unskippable]
    names: dict[tuple[str, tuple[str, ...]], str] = {}
    for kind in dict.fromkeys(s.kind for s in skippable):
        distinct = list(dict.fromkeys(keys[s] for s in skippable if s.kind == kind))
        for number, key in enumerate(distinct, 1):
            names[kind, key] = kind if len(distinct) == 1 else f"{kind} {number}"
    return tuple(names.get((s.kind, keys[s]), "") for s in runtime.sublayers)


def plans_to_time(
    sublayers: tuple[Sublayer, ...],
    classes: tuple[str, ...],
    surrogates: Sequence[Surrogates] = (),
    kv_only: bool = False,
) -> list[SkipPlan]:
    """Return the plans whose times say what each part costs.

    They are the full model, half of each class left out, half of all, and half of all with each
    kind of surrogate. Half, because that is about as far as plans go, and more would be measured
    worse: the rest of a step does not shrink.

    Raises:
        ValueError: fewer than two sublayers, or none that can be skipped.
    """
    members: dict[str, list[Sublayer]] = {}
    for sublayer, name in zip(sublayers, classes, strict=True):
        if name:
            members.setdefault(name, []).append(sublayer)
    if len(sublayers) < 2 or not members:
        raise ValueError(f"nothing to choose: of {len(sublayers)} sublayers none can be skipped")
    halves = [group[::2] for group in members.values()]
    mixed = [s for half in halves for s in half]
    mixed = mixed[:-1] if len(mixed) == len(sublayers) else mixed
    plans = [SkipPlan.empty(sublayers)]
    plans += [SkipPlan.of(sublayers, half) for half in halves]
    if len(halves) > 1:
        plans.append(SkipPlan.of(sublayers, mixed))
    plans += [SkipPlan.of(sublayers, mixed, surrogates=c) for c in surrogates]
    if kv_only:
        for half in halves:
            stored = dict.fromkeys((s for s in half if s.kind != "ffn"), Action.KV_ONLY)
            if stored:
                plans.append(SkipPlan(sublayers, stored, stored))
    return plans


def measure_plans(
    clock: TimeStep, phase: Phase, context: int, plans: Sequence[SkipPlan], rounds: int
) -> Array:
    """Return the seconds of each plan [plans], which take turns; every other round goes backwards.

    Args:
        clock: see `time_step` of :func:`measure`.
        phase: whether to time prompts or decode steps.
        context: tokens of the prompt, or tokens stored after the step.
        plans: what to time.
        rounds: how often each is timed, after one that does not count, because it compiles and
            links.
    """
    _rounds(clock, phase, context, plans, 1)
    return steady(_rounds(clock, phase, context, plans, rounds))


def steady(samples: Array) -> Array:
    """Return the seconds of each plan [plans], from samples [plans, rounds].

    What rounds differ in is taken out by Tukey's median polish of their logarithms: a sample is
    the plan's time, times how slow its round was, times noise of which single samples may be far
    off.
    """
    logs = np.log(samples)
    plan = np.median(logs, axis=1)
    for _ in range(16):
        rounds = np.median(logs - plan[:, None], axis=0)
        plan = np.median(logs - (rounds - np.median(rounds)), axis=1)
    return np.asarray(np.exp(plan))


def solve(
    counts: Sequence[Mapping[str, float]], seconds: npt.ArrayLike
) -> tuple[dict[str, float], float]:
    """Return what each part costs, from steps that consist of `counts` of them.

    It minimizes the squares of relative errors; a cost that would come out negative is 0.

    Args:
        counts: for each step how many there are of each part.
        seconds: what each step took.

    Returns:
        Seconds by cost term, and by how much the sum of cost terms is off at most, relatively.
    """
    took = np.asarray(seconds, dtype=np.float64)
    names = list(dict.fromkeys(name for row in counts for name in row))
    rows = np.array([[row.get(name, 0) for name in names] for row in counts]) / took[:, None]
    found = _not_negative(rows, np.ones(len(took)))
    error = float(np.abs(rows @ found - 1).max())
    return dict(zip(names, found.tolist(), strict=True)), error


def _not_negative(rows: Array, target: Array) -> Array:
    """Solve by least squares over the columns that do not come out negative; others are 0."""
    kept = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(rows[:, kept], target, rcond=None)[0]
        worst = int(found.argmin())
        if found[worst] >= 0:
            break
        del kept[worst]
    solution = np.zeros(rows.shape[1])
    solution[kept] = found
    return solution


def _costs(
    clock: TimeStep,
    phase: Phase,
    context: int,
    plans: Sequence[SkipPlan],
    counts: Sequence[Mapping[str, float]],
    rounds: int,
) -> Costs:
    _rounds(clock, phase, context, plans, 1)
    samples = _rounds(clock, phase, context, plans, rounds)
    while True:
        seconds, error = solve(counts, steady(samples))
        if error <= _GOOD or samples.shape[1] >= 3 * rounds:
            return Costs(phase, context, seconds, error)
        samples = np.hstack([samples, _rounds(clock, phase, context, plans, rounds)])


def _rounds(
    clock: TimeStep, phase: Phase, context: int, plans: Sequence[SkipPlan], rounds: int
) -> Array:
    """Return samples [plans, rounds]."""
    samples = np.zeros((len(plans), rounds))
    for turn in range(rounds):
        order = reversed(range(len(plans))) if turn % 2 else range(len(plans))
        for i in order:
            samples[i, turn] = clock(phase, context, plans[i])
    return samples


def check_contexts(runtime: Runtime, contexts: Iterable[int], rounds: int) -> list[int]:
    """Return the contexts in order, each once.

    Raises:
        ValueError: none, one of fewer than 16 tokens or of more than the model takes, or fewer
            than one round.
    """
    lengths = sorted(set(contexts))
    if not lengths or lengths[0] < _SHORTEST:
        raise ValueError(f"contexts must be lengths of at least {_SHORTEST} tokens, got {lengths}")
    check_length(runtime.graphs, lengths[-1])
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    return lengths
