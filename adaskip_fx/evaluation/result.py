"""What an evaluation found, as plain data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaskip_fx.plans.decisions import Decision
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.utils.files import JSON
from adaskip_fx.utils.token_losses import perplexity

from .execution_check import Ran
from .token_metrics import Bucket

SCHEMA = 1


def decision_json(decision: Decision) -> dict[str, JSON]:
    """Return a plan as in its file; of several plans the kind, the digest and all of them."""
    if isinstance(decision, SkipPlan):
        return decision.to_json()
    plans: list[JSON] = [plan.to_json() for plan in decision.plans]
    return {"kind": decision.kind, "digest": decision.digest, "plans": plans}


@dataclass(frozen=True)
class Scores:
    """A model's scores on a task.

    Attributes:
        values: the score of each example in [0, 1]; of a perplexity task each window's mean
            negative log-likelihood.
        mean: the mean of the values; of a perplexity task the perplexity over all tokens.
        error: the mean's standard error over examples; None with fewer than two. (For a
            perplexity by the delta method: the mean times the standard error of the logarithm.)
    """

    values: tuple[float, ...]
    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Scores:
        """Return the scores of values in [0, 1]."""
        return cls(tuple(values), statistics.fmean(values), standard_error(values))

    @classmethod
    def of_windows(cls, sums: Sequence[tuple[float, int]]) -> Scores:
        """Return a perplexity, from each window's negative log-likelihood and number of tokens."""
        nll, tokens = sum(n for n, _ in sums), sum(t for _, t in sums)
        values = tuple(n / t for n, t in sums)
        mean, error = perplexity(nll, tokens), standard_error(values)
        return cls(values, mean, None if error is None else mean * error)

    def to_json(self) -> dict[str, JSON]:
        """Return all of it."""
        return {"mean": self.mean, "standard_error": self.error, "values": list(self.values)}


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of `values`; None with fewer than two."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class TaskResult:
    """One task's result.

    Attributes:
        task: the task's name.
        metric: the name of the score.
        options: the options of the task.
        scores: the scores of the model.
        reference: those of the reference model on the same examples; None without one.
        buckets: a perplexity task's sums by position, over all windows.
        answers: what was generated, if anything was.
        ran: what a compiled model ran; None for a model that is not compiled.
        seconds: the model's time, compiling included.
        examples_sha256: digest of all examples, as tokens.
        files: the sha256 of each file that was read, by name.
    """

    task: str
    metric: str
    options: Mapping[str, JSON]
    scores: Scores
    reference: Scores | None
    buckets: tuple[Bucket, ...]
    answers: tuple[str, ...]
    ran: Ran | None
    seconds: float
    examples_sha256: str
    files: Mapping[str, JSON]

    @property
    def title(self) -> str:
        """The task's name, and the file's that it reads."""
        path = self.options.get("path")
        return self.task if path is None else f"{self.task} ({path})"

    @property
    def kl(self) -> float | None:
        """The mean divergence from the reference model, nats a token; None if there is none."""
        known = [(b.kl, b.tokens) for b in self.buckets if b.kl is not None]
        return sum(k for k, _ in known) / sum(n for _, n in known) if known else None

    def to_json(self) -> dict[str, JSON]:
        """Return all of it."""
        return {
            "task": self.task,
            "metric": self.metric,
            "options": dict(self.options),
            "n": len(self.scores.values),
            **self.scores.to_json(),
            "reference": None if self.reference is None else self.reference.to_json(),
            "kl": self.kl,
            "buckets": [b.to_json() for b in self.buckets],
            "answers": list(self.answers),
            "ran": None if self.ran is None else self.ran.to_json(),
            "seconds": self.seconds,
            "examples_sha256": self.examples_sha256,
            "files": dict(self.files),
        }


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        conditions: model, plan, device and versions.
        results: in the order of the tasks.
    """

    conditions: Mapping[str, JSON]
    results: tuple[TaskResult, ...]

    def to_json(self) -> dict[str, JSON]:
        """Return all of it, for a file."""
        return {
            "schema": SCHEMA,
            "conditions": dict(self.conditions),
            "results": [r.to_json() for r in self.results],
        }
