"""What a windowed model loses on texts that nothing was fitted on, and which answers it keeps.

Each window of text and each question is put to the full model as well, so that intervals are of
paired differences; rows keep what each of them said, so that two rows can be compared in pairs too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaskip_fx.evaluation.examples import Recall
from adaskip_fx.evaluation.result import standard_error
from adaskip_fx.evaluation.task import Task
from adaskip_fx.evaluation.tasks import MultiKeyNeedle, Passkey
from adaskip_fx.plans.skip_plan import SkipPlan

from .quality import Cost, add, normalised
from .setup import Subject, Text
from .windowed_model import WindowedModel

_AT_ONCE = 8  # questions


class Judge:
    """Judges windowed models.

    Attributes:
        full: What the full model makes of texts and tasks.
    """

    def __init__(self, subject: Subject, known: Sequence[Text]) -> None:
        """Ask the full model; `known` are the texts that others learn from."""
        self._device = subject.device
        self._texts = subject.held_out(known)
        self._asked = {
            task.name: [e for e in task.examples(subject.tokenizer) if isinstance(e, Recall)]
            for task in tasks(subject)
        }
        self._right: dict[str, list[bool]] = {}
        with WindowedModel(subject, SkipPlan.empty(subject.runtime.sublayers)).running() as model:
            self.full = self(model)

    @torch.no_grad()
    def __call__(self, model: WindowedModel) -> dict[str, Any]:
        """Return a row's texts and tasks, of a running model."""
        texts = {name: self._lost(model, cut) for name, cut in self._texts.items()}
        return {"texts": texts, "tasks": {name: self._answers(model, name) for name in self._asked}}

    def _lost(self, model: WindowedModel, cut: Sequence[torch.Tensor]) -> dict[str, Any]:
        full, ours, each = Cost(), Cost(), []
        for ids in cut:
            expected = normalised(model.logits(ids, full=True))
            actual = normalised(model.logits(ids))
            before, tokens = (ours.kl, ours.nll - full.nll), ids.shape[1] - 1
            add(full, expected, expected, ids)
            add(ours, actual, expected, ids)
            after = ours.kl, ours.nll - full.nll
            each.append([(b - a) / tokens for a, b in zip(before, after, strict=True)])
        kl, log_ratio = ([one[n] for one in each] for n in (0, 1))
        errors = {"kl_error": standard_error(kl), "log_ratio_error": standard_error(log_ratio)}
        return {**ours.against(full), **errors, "kl_each": kl, "log_ratio_each": log_ratio}

    def _answers(self, model: WindowedModel, task: str) -> dict[str, Any]:
        """An answer is right if each token is the likeliest one, given those before it."""
        asked, right = self._asked[task], list[bool]()
        for begin in range(0, len(asked), _AT_ONCE):
            right += recalled(model, asked[begin : begin + _AT_ONCE], self._device)
        full = self._right.setdefault(task, right)
        mean, error = paired(right, full)
        said = "".join(str(int(answer)) for answer in right)
        lost = {"difference": mean, "standard_error": error, "right": said}
        return {"mean": sum(right) / len(right), **lost}


def tasks(subject: Subject) -> list[Task]:
    """Return questions whose answers are read, not generated."""
    size: dict[str, Any] = {
        "samples": 200 if subject.device.type == "cuda" else 2,
        "length": subject.length,
        "seed": 1 + subject.options.seed,
        "forced": True,
    }
    return [Passkey(**size), MultiKeyNeedle(**size)]


def recalled(model: WindowedModel, asked: Sequence[Recall], device: torch.device) -> list[bool]:
    """Return which answers a running model finds, asked in one batch, padded at the end."""
    rows = [[*one.prompt, *one.answer[:-1]] for one in asked]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    first = min(len(one.prompt) for one in asked) - 1
    said = model.logits(ids, longest - first).argmax(-1).tolist()
    found = []
    for one, likeliest in zip(asked, said, strict=True):
        start = len(one.prompt) - 1 - first
        found.append(likeliest[start : start + len(one.answer)] == [*one.answer])
    return found


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of the differences, and its standard error."""
    lost = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
    return sum(lost) / len(lost), standard_error(lost)


def against(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return by how much a row is better or worse than another of the same texts and questions.

    Means of paired differences with their standard errors: of KL and of log perplexity over all
    windows of all texts, and of each task's answers.
    """
    found: dict[str, Any] = {}
    for name in ("kl", "log_ratio"):
        pooled = ([x for t in r["texts"].values() for x in t[f"{name}_each"]] for r in (row, other))
        found[name] = paired(*pooled)
    for task, score in row["tasks"].items():
        found[task] = paired(*([int(x) for x in s["right"]] for s in (score, other["tasks"][task])))
    return found
