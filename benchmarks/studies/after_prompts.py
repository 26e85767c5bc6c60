"""What is lost after a prompt: text that goes on, and answers, against the full model's.

A window of text is cut in halves: the first is a prompt, the second is read after it as decoded
tokens are, so that it sees what the prompt has left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adaskip_fx.evaluation.examples import Recall
from adaskip_fx.evaluation.result import standard_error
from adaskip_fx.evaluation.task import Task

from .quality import Cost, add, normalised
from .setup import Subject

#: Reads tokens int64 [1, n] after a prompt int64 [1, T] in several ways: a key of each, and the
#: logits [n + 1, V] that predict each token and one more. The first is the full model.
Read = Callable[[torch.Tensor, torch.Tensor], Iterator[tuple[Hashable, torch.Tensor]]]
_SMALLEST = 1e-7  # nats: in float32 less is rounding


@dataclass
class _Cell:
    texts: dict[str, Cost] = field(default_factory=dict)
    answers: dict[str, list[float]] = field(default_factory=dict)

    def all(self) -> Cost:
        """Return the sums over all texts."""
        costs = self.texts.values()
        return Cost(*(sum(getattr(c, n) for c in costs) for n in ("tokens", "nll", "kl", "agreed")))


class AfterPrompts:
    """What each way loses; `read` says how they read."""

    def __init__(self, subject: Subject, read: Read) -> None:
        self._subject, self._read = subject, read
        self._cells: dict[Hashable, _Cell] = {}

    def go_on(self, name: str, ids: torch.Tensor) -> None:
        """Read the second half of a window int64 [1, T] of a text after its first."""
        half, expected = ids.shape[1] // 2, None
        for key, logits in self._read(ids[:, :half], ids[:, half:]):
            actual = normalised(logits[None, 1:])  # (the first is the prompt's own)
            expected = actual if expected is None else expected
            cost = self._cells.setdefault(key, _Cell()).texts.setdefault(name, Cost())
            add(cost, actual, expected, ids[:, half:])

    def ask(self, task: Task) -> None:
        """Put a task's questions; an answer is right if each token is the likeliest one."""
        device = self._subject.device
        for example in task.examples(self._subject.tokenizer):
            assert isinstance(example, Recall), "answers are given, not generated"
            asked = example.prompt, example.answer
            prompt, answer = (torch.tensor([ids], device=device) for ids in asked)
            for key, logits in self._read(prompt, answer[:, :-1]):
                right = float((logits.argmax(-1) == answer[0]).all())
                answers = self._cells.setdefault(key, _Cell()).answers
                answers.setdefault(task.name, []).append(right)

    def full(self) -> dict[str, Any]:
        """Return perplexities of the full model, and what it finds."""
        full = self._full
        texts = {name: cost.perplexity for name, cost in full.texts.items()}
        return {"perplexity": texts, "tasks": {t: sum(v) / len(v) for t, v in full.answers.items()}}

    def kl(self, key: Hashable) -> float:
        """Return the mean divergence from the full model, nats a token of all texts."""
        cost = self._cells[key].all()
        return cost.kl / cost.tokens

    def lost(self, key: Hashable) -> dict[str, Any]:
        """Return what a way costs over all texts, on each text, and in answers."""
        cell, full = self._cells[key], self._full
        texts = {name: cost.against(full.texts[name]) for name, cost in cell.texts.items()}
        tasks = {t: _paired(values, full.answers[t]) for t, values in cell.answers.items()}
        return {**cell.all().against(full.all()), "texts": texts, "tasks": tasks}

    @property
    def _full(self) -> _Cell:
        return next(iter(self._cells.values()))


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    lost = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, error = sum(lost) / len(lost), standard_error(lost)
    return {"mean": sum(ours) / len(ours), "difference": mean, "standard_error": error}


def answered(row: Mapping[str, Any]) -> list[str]:
    """Return cells of a table: by how much more of each task is right than the full model's."""
    errors = [score["standard_error"] for score in row["tasks"].values()]
    said = ["" if error is None else f" ± {error:.3f}" for error in errors]
    scores = row["tasks"].values()
    return [f"{s['difference']:+.3f}{e}" for s, e in zip(scores, said, strict=True)]


def logarithm(kl: float | None) -> float | None:
    """Return the decimal logarithm of a divergence, for a picture; None for none."""
    return None if kl is None else math.log10(max(kl, _SMALLEST))
