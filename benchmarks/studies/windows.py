"""What windows keep, by K/V head and by layer, against attention that is left out altogether.

Windows are chosen on the first halves of two texts and on questions about them, without training,
and read on both halves of other texts (on second halves where there is no other). Shares are of the
keys and values that a decode step does not read with a whole window of text stored. Retrieval is
asked in other words than the questions that chose; arithmetic and brackets need depth. Each prompt
is put to the full model as well, and the interval is of the paired difference.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaskip_fx.calibration.loss import CalibrationLoss
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
from adaskip_fx.fitting.choose_windows import WindowRecipe, answerable_questions, free_memory
from adaskip_fx.model.load import choose_device
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window
from adaskip_fx.policies import Windowed

from .quality import costs
from .setup import Options, Subject, Text, open_subject

PICTURES = ("heads",)
SHARES = (0.4, 0.55, 0.7)
#: Name -> options of `Windowed`; ``--policy`` chooses among them.
WAYS: Mapping[str, dict[str, Any]] = {
    "heads": {},
    "heads, forward": {"shortlist": 4},
    "heads, backward": {"shortlist": 4, "start": "windowed"},
    "layers, forward": {"per": "layer", "shortlist": 4},
}


def measure(options: Options) -> dict[str, Any]:
    """Rows of every way at every share; on a GPU in bfloat16, for which attention is fast."""
    if options.dtype is None and choose_device(options.device).type == "cuda":
        options = replace(options, dtype="bfloat16")
    subject = open_subject(options)
    return {**subject.about(), **windows(subject)}


def windows(subject: Subject, shares: Sequence[float] = SHARES) -> dict[str, Any]:
    """Return the rows, and the order in which heads and layers get windows."""
    known = [t for t in subject.texts if t.name in subject.calibrated]
    judge = _Judge(subject, known)
    window, seconds = Window(max(4, subject.length // 16)), dict[str, float]()
    rows, maps = list[dict[str, Any]](), list[dict[str, Any]]()
    for way, per_share in _ways(subject, known, window, shares, seconds, maps).items():
        for share, plan in per_share.items():
            rows.append({"way": way, "share": share, "plan": plan.to_json(), **judge(plan)})
            print(_line(rows[-1], judge.full), file=sys.stderr, flush=True)
    return {
        "calibrated_on": [t.name for t in known],
        "window": window.to_json(),
        "context": subject.length,
        "full": judge.full,
        "rows": rows,
        "maps": maps,
        "seconds": seconds,
    }


def _ways(
    subject: Subject,
    known: Sequence[Text],
    window: Window,
    shares: Sequence[float],
    seconds: dict[str, float],
    maps: list[dict[str, Any]],
) -> dict[str, dict[float, SkipPlan]]:
    """Return a plan for each way and share; `seconds` and `maps` get what it took and the order."""
    halves = [w for text in known for w in subject.windows(text, "first")]
    count = 4 * subject.samples
    asked = subject.tokenizer, halves, count, subject.length, subject.options.seed
    questions = answerable_questions(subject.compiled, *asked)
    loss = CalibrationLoss(
        subject.compiled,
        halves,
        questions,
        text_weight=WindowRecipe.text_weight,
        answer_divergence=True,
        memory=free_memory(subject.device),
    )
    profile = subject.profile(known[0])
    found: dict[str, dict[float, SkipPlan]] = {}
    for way in subject.options.policies or WAYS:
        policy = Windowed(loss, loss.kv_heads, window, context=subject.length, **WAYS[way])
        start = time.perf_counter()
        farthest = min(shares) if policy.start == "windowed" else max(shares)
        plans = policy.plans(profile, 1 / (1 - farthest))
        plans = sorted(plans, key=policy.alpha_of)
        seconds[way] = time.perf_counter() - start
        print(f"{way}: {seconds[way]:.0f} s, {loss.judged} plans judged", file=sys.stderr)
        enough = [[p for p in plans if policy.alpha_of(p) >= 1 / (1 - s) - 1e-9] for s in shares]
        found[way] = {share: some[0] for share, some in zip(shares, enough, strict=True)}
        heads = {str(s): count for s, count in loss.kv_heads.items()}
        maps.append({"name": way, "heads": heads, "order": _order(plans, policy)})
    found["attention skipped"] = {
        share: _skipped(profile, share, len(loss.kv_heads)) for share in shares
    }
    return found


def _order(plans: Sequence[SkipPlan], policy: Windowed) -> list[list[Any]]:
    """Return which (sublayer, K/V heads) get a window one after another, by plans that grow."""
    steps, before = list[list[Any]](), dict[Any, set[int]]()
    for plan in plans:
        for sublayer, window in plan.windows.decode.items():
            now = set(range(policy.heads[sublayer])) - set(window.full_heads)
            new = sorted(now - before.get(sublayer, set()))
            together = [new] if policy.per == "layer" else [[head] for head in new]
            steps += [[str(sublayer), heads] for heads in together if heads]
            before[sublayer] = now
    return steps


def _skipped(profile: Any, share: float, count: int) -> SkipPlan:
    """Return the plan that skips as large a share of attention, the most similar, with scales."""
    similarity = dict(zip(profile.sublayers, profile.similarity().tolist(), strict=True))
    attention = sorted(
        (s for s in profile.sublayers if s.kind == "attention"), key=lambda s: -similarity[s]
    )
    skip = attention[: round(share * count)]
    scales = profile.scales().factors
    factors = {s: scales[s] for s in skip if s in scales}
    return SkipPlan.of(profile.sublayers, skip, surrogates=Surrogates.scale(factors))


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
        others = [t for t in subject.texts if t not in known]
        self._texts = {t.name: subject.windows(t, "second") for t in others or subject.texts}
        for text in others:  # nothing was chosen on their first halves
            self._texts[text.name] += subject.windows(text, "first")
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
