"""`evaluate` puts tasks to a model, compiled or not."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adaskip_fx.measurement.environment import environment
from adaskip_fx.runtime.runtime import Runtime
from adaskip_fx.utils.files import JSON

from . import scoring
from .examples import Example, Generate, Predict, to_json
from .execution_check import watched
from .result import Evaluation, Scores, TaskResult, decision_json
from .task import Task, files_of, options_of
from .token_metrics import Bucket, by_position

Progress = Callable[[int, int], None]


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    reference: Any = None,
    about: Mapping[str, JSON] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Put tasks to a model and say how it did.

    Every step of a compiled model is watched: that the sublayers which its plan skips were left
    out is checked, and how much was left out is recorded.

    Args:
        model: a transformers decoder, plain or compiled by :func:`adaskip_fx.compile`.
        tokenizer: the model's.
        tasks: see :mod:`adaskip_fx.evaluation.tasks`.
        reference: a model to compare with, usually the one that `model` was compiled from; it
            gets the same examples, and perplexity tasks give the divergence from it.
        about: more to record with the conditions.
        progress: called with (examples done, examples in all).

    Raises:
        ValueError: a task that leaves no example.
        NotMeasuredError: a task that runs none of the steps in which the plan leaves something
            out, so that it would measure the full model; a ValueError.
        SkipPathError: a compiled model did not run what its plan says.
    """
    if reference is model:
        raise ValueError("the reference is the model itself; pass the model it was compiled from")
    alone = reference is None
    prepared = [(task, _examples(task, tokenizer, alone)) for task in tasks]  # before minutes
    counter = _Counter(progress, sum(len(examples) for _, examples in prepared))
    results = tuple(
        _run_task(model, tokenizer, task, examples, reference, counter)
        for task, examples in prepared
    )
    return Evaluation({**conditions(model), **(about or {})}, results)


def conditions(model: Any) -> dict[str, JSON]:
    """Return model, plan, device and versions."""
    runtime = getattr(model, "_adaskip", None)
    compiled = runtime if isinstance(runtime, Runtime) else None
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "plan": decision_json(compiled.plan) if compiled else None,
        "policy": repr(compiled.policy) if compiled and compiled.policy else None,
        "backend": compiled.graphs.backend if compiled else None,
        **environment(model),
    }


@dataclass
class _Counter:
    """Reports progress, one example after the other."""

    report: Progress | None
    total: int
    done: int = 0

    def next(self) -> None:
        if self.report is not None:
            self.report(self.done, self.total)
        self.done += 1


def _examples(task: Task, tokenizer: Any, alone: bool) -> Sequence[Example]:
    examples = task.examples(tokenizer)
    if not examples:
        raise ValueError(f"the task {task.name} has no example with these options")
    if alone and any(isinstance(e, Generate) and not e.answers for e in examples):
        raise ValueError(
            f"the task {task.name} compares with what a reference model says, and there is none; "
            "give evaluate(reference=...), on the command line a profile or a plan"
        )
    return examples


@dataclass
class _Found:
    """What one task has found so far."""

    scores: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    windows: list[list[Bucket]] = field(default_factory=list)
    seconds: float = 0.0


def _run_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    reference: Any,
    counter: _Counter,
) -> TaskResult:
    found = _Found()
    with watched(model) as watch:
        for example in examples:
            counter.next()
            _put(model, tokenizer, task, example, reference, found)
    if watch is not None:
        watch.check_measured(f"the task {task.name}")
    scores, compared = _scores(found, reference is not None)
    return TaskResult(
        task=task.name,
        metric=task.metric,
        options=options_of(task),
        scores=scores,
        reference=compared,
        buckets=_summed_buckets(found.windows),
        answers=tuple(found.answers),
        ran=None if watch is None else watch.read(),
        seconds=found.seconds,
        examples_sha256=digest(examples),
        files=files_of(task),
    )


def _put(
    model: Any, tokenizer: Any, task: Task, example: Example, reference: Any, found: _Found
) -> None:
    """Put one example to the model, and to the reference."""
    start = time.perf_counter()
    if isinstance(example, Predict):
        tokens, logits = scoring.predictions(model, example)
        found.seconds += time.perf_counter() - start
        others = None if reference is None else scoring.predictions(reference, example)[1]
        edges: Sequence[int] = getattr(task, "edges", ())
        found.windows.append(by_position(tokens, logits, others, edges))
        return
    if isinstance(example, Generate) and not example.answers:
        said = scoring.generated(reference, tokenizer, example)
        example = replace(example, answers=(said,))
        start = time.perf_counter()
    outcome = scoring.score(model, tokenizer, example)
    found.seconds += time.perf_counter() - start
    found.scores.append(outcome.score)
    if outcome.text is not None:
        found.answers.append(outcome.text)
    if reference is not None:
        found.reference.append(scoring.score(reference, tokenizer, example).score)


def _scores(found: _Found, compared: bool) -> tuple[Scores, Scores | None]:
    """Return the model's scores, and the reference's."""
    if not found.windows:
        return Scores.of(found.scores), Scores.of(found.reference) if compared else None
    tokens = [sum(b.tokens for b in window) for window in found.windows]
    ours = [sum(b.nll for b in window) for window in found.windows]
    theirs = [sum(b.reference_nll or 0.0 for b in window) for window in found.windows]
    scores = Scores.of_windows(list(zip(ours, tokens, strict=True)))
    other = Scores.of_windows(list(zip(theirs, tokens, strict=True))) if compared else None
    return scores, other


def _summed_buckets(windows: Sequence[Sequence[Bucket]]) -> tuple[Bucket, ...]:
    """Return each bucket, summed over all windows."""
    sums: dict[int, Bucket] = {}
    for bucket in (b for window in windows for b in window):
        known = sums.get(bucket.first)
        sums[bucket.first] = bucket if known is None else known + bucket
    return tuple(sums[first] for first in sorted(sums))


def digest(examples: Sequence[Example]) -> str:
    """Return the sha256 of all that examples ask, in hexadecimal."""
    joined = hashlib.sha256()
    for example in examples:
        joined.update(json.dumps(to_json(example), sort_keys=True).encode())
    return joined.hexdigest()
