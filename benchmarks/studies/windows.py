"""What windows keep, by K/V head and by layer, against attention that is left out altogether.

Windows are chosen on the first halves of two texts and on questions about them, without training,
and read on both halves of other texts (on second halves where there is no other). Shares are of the
keys and values that a decode step does not read with a whole window of text stored. Retrieval is
asked in other words than the questions that chose; arithmetic and brackets need depth. Each prompt
is put to the full model as well, and the interval is of the paired difference.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaskip_fx.evaluation.evaluate import evaluate
from adaskip_fx.evaluation.examples import Example
from adaskip_fx.evaluation.result import standard_error
from adaskip_fx.evaluation.task import Task
from adaskip_fx.evaluation.tasks import (
    Arithmetic,
    Brackets,
    KeyValue,
    MultiKeyNeedle,
    Passkey,
    VariableTracking,
)
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.windows import Window

from .quality import costs
from .setup import Options, Subject, Text, open_subject
from .window_plans import Given, Search, Source

PICTURES = ("shares", "heads")
SHARES = (0.4, 0.55, 0.7)


def measure(options: Options) -> dict[str, Any]:
    """Rows of every way at every share, in float32 if nothing is said.

    Rounding to bfloat16 is a divergence of its own, which hides small ones.
    """
    subject = open_subject(options)
    return windows(subject)


def windows(subject: Subject, shares: Sequence[float] = SHARES) -> dict[str, Any]:
    """Return the rows, and the order in which heads and layers get windows; saved row by row.

    Plans that are given (``--plan``) are judged instead of those that a search finds; ``--keep``
    saves the latter.
    """
    known = [t for t in subject.texts if t.name in subject.calibrated]
    window = Window(max(4, subject.length // 16))
    given = subject.options.plans
    source: Source = Given(subject, window) if given else Search(subject, known, window)
    found = [*source.plans(shares)]
    order = [*dict.fromkeys(way for way, _, _ in found)]
    found.sort(key=lambda one: (order.index(one[0]), one[1]))
    judge, rows = _Judge(subject, known), list[dict[str, Any]]()
    result = {
        **subject.about(),
        "calibrated_on": [t.name for t in known],
        "window": window.to_json(),
        "context": subject.length,
        "full": judge.full,
        "rows": rows,
        "maps": source.maps,
        "seconds": source.seconds,
    }
    for way, share, plan in found:
        rows.append({"way": way, "share": share, "plan": plan.to_json(), **judge(plan)})
        print(_line(rows[-1], judge.full), file=sys.stderr, flush=True)
        subject.options.save(result)
    return result


@dataclass(frozen=True)
class _Asked:
    """A task whose examples are made once, for every plan."""

    name: str
    metric: str
    made: tuple[Example, ...]

    @classmethod
    def of(cls, task: Task, tokenizer: Any) -> _Asked:
        return cls(task.name, task.metric, tuple(task.examples(tokenizer)))

    def examples(self, tokenizer: Any) -> tuple[Example, ...]:
        return self.made


class _Judge:
    """What a plan loses on texts, and what of the full model's answers it keeps."""

    def __init__(self, subject: Subject, known: Sequence[Text]) -> None:
        self._subject = subject
        self._texts = subject.held_out(known)
        on_gpu = subject.device.type == "cuda"
        size: dict[str, Any] = {
            "samples": 200 if on_gpu else 2,
            "length": subject.length,
            "seed": 1 + subject.options.seed,
        }
        self._tasks: list[Task] = [Passkey(**size), MultiKeyNeedle(**size)]
        self._tasks += [KeyValue(**size), VariableTracking(**size)] if on_gpu else []
        shorter = {**size, "length": subject.length // 4}  # what a model without depth cannot do
        self._tasks += [Arithmetic(digits=1, **shorter), Brackets(unclosed=2, **shorter)]
        self._asked = list[Task]()
        self._values: dict[str, tuple[float, ...]] = {}
        self.full = self(SkipPlan.empty(subject.runtime.sublayers))

    def __call__(self, plan: SkipPlan) -> dict[str, Any]:
        texts = {}
        for name, cut in self._texts.items():
            full, (ours,) = costs(self._subject.runtime, [plan], cut)
            texts[name] = ours.against(full)
        return {"texts": texts, "tasks": self._answers(plan)}

    def _answers(self, plan: SkipPlan) -> dict[str, Any]:
        runtime, tokenizer, found = self._subject.runtime, self._subject.tokenizer, {}
        self._asked = self._asked or [_Asked.of(task, tokenizer) for task in self._tasks]
        runtime.plan = plan
        try:
            results = evaluate(self._subject.compiled, tokenizer, self._asked).results
        finally:
            runtime.plan = SkipPlan.empty(runtime.sublayers)
        for result in results:
            values = result.scores.values
            full = self._values.setdefault(result.task, values)
            lost = [ours - theirs for ours, theirs in zip(values, full, strict=True)]
            found[result.task] = {
                "mean": result.scores.mean,
                "difference": sum(lost) / len(lost),
                "standard_error": standard_error(lost),
            }
        return found


def _line(row: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    cells = [f"{row['way']:18s} {row['share']:.2f}"]
    for name, cost in row["texts"].items():
        cells.append(f"{name} x{cost['perplexity_ratio']:.3f} KL {cost['kl']:.4f}")
    for task, score in row["tasks"].items():
        cells.append(f"{task} {score['mean']:.3f} of {full['tasks'][task]['mean']:.3f}")
    return "  ".join(cells)


def summary(result: Mapping[str, Any]) -> str:
    """Return one line for each row."""
    window = result["window"]
    head = (
        f"windows of {window['sinks']}+{window['tokens']} at {result['context']} tokens, chosen on "
        f"{', '.join(result['calibrated_on'])}"
    )
    return "\n".join([head, *(_line(row, result["full"]) for row in result["rows"])])
