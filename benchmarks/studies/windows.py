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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window
from adaskip_fx.policies import Windowed

from .quality import costs
from .setup import Options, Subject, Text, open_subject

PICTURES = ("heads",)
SHARES = (0.4, 0.55, 0.7)
#: Name -> options of `Windowed`; ``--policy`` chooses among them and `SKIPPED`.
WAYS: Mapping[str, dict[str, Any]] = {
    "heads": {},
    "heads, forward": {"shortlist": 4},
    "heads, backward": {"shortlist": 4, "start": "windowed"},
    "layers, forward": {"per": "layer", "shortlist": 4},
}
SKIPPED = "attention skipped"
_QUESTIONS = 8  # for each sample of a text


def measure(options: Options) -> dict[str, Any]:
    """Rows of every way at every share, in float32 if nothing is said.

    Rounding to bfloat16 is as large a divergence as that of a few heads.
    """
    subject = open_subject(options)
    return {**subject.about(), **windows(subject)}


def windows(subject: Subject, shares: Sequence[float] = SHARES) -> dict[str, Any]:
    """Return the rows, and the order in which heads and layers get windows.

    Plans that are given (``--plan``) are judged instead of those that a search finds; ``--keep``
    saves the latter.
    """
    known = [t for t in subject.texts if t.name in subject.calibrated]
    window = Window(max(4, subject.length // 16))
    given = subject.options.plans
    source: _Source = _Given(subject, window) if given else _Search(subject, known, window)
    found = [*source.plans(shares)]
    judge, rows = _Judge(subject, known), list[dict[str, Any]]()
    for way, share, plan in found:
        rows.append({"way": way, "share": share, "plan": plan.to_json(), **judge(plan)})
        print(_line(rows[-1], judge.full), file=sys.stderr, flush=True)
    return {
        "calibrated_on": [t.name for t in known],
        "window": window.to_json(),
        "context": subject.length,
        "full": judge.full,
        "rows": rows,
        "maps": source.maps,
        "seconds": source.seconds,
    }


class _Source(Protocol):
    """Where plans come from.

    Attributes:
        seconds: that each way took.
        maps: of each way the order in which units got windows.
    """

    seconds: dict[str, float]
    maps: list[dict[str, Any]]

    def plans(self, shares: Sequence[float]) -> Iterator[tuple[str, float, SkipPlan]]:
        """Return way, share and plan of those that are wanted."""


class _Given:
    """Plans that a search has left in files; those of one name are of one way."""

    def __init__(self, subject: Subject, window: Window) -> None:
        self._subject, self._window = subject, window
        self.seconds: dict[str, float] = {}
        self.maps: list[dict[str, Any]] = []

    def plans(self, shares: Sequence[float]) -> Iterator[tuple[str, float, SkipPlan]]:
        named: dict[str, list[SkipPlan]] = {}
        for name, path in self._subject.options.plans:
            plan = SkipPlan.load(path)
            if plan.sublayers != self._subject.runtime.sublayers:
                raise ValueError(f"{path} is not a plan of this model")
            named.setdefault(name, []).append(plan)
        heads, length = self._subject.compiled.adaskip.kv_heads, self._subject.length
        count = Windowed(lambda *_: 0.0, heads, self._window, context=length)
        for way, plans in named.items():
            plans.sort(key=count.alpha_of)
            self.maps.append(_map(way, plans, count))
            yield from ((way, round(1 - 1 / count.alpha_of(plan), 4), plan) for plan in plans)


class _Search:
    """Finds a plan for each way and share."""

    def __init__(self, subject: Subject, known: Sequence[Text], window: Window) -> None:
        self._subject, self._window = subject, window
        self._profile = subject.profile(known[0])
        halves = [w for text in known for w in subject.windows(text, "first")]
        count = _QUESTIONS * subject.samples
        asked = subject.tokenizer, halves, count, subject.length, subject.options.seed
        self._loss = CalibrationLoss(
            subject.compiled,
            halves,
            answerable_questions(subject.compiled, *asked),
            text_weight=WindowRecipe.text_weight,
            answer_divergence=True,
            memory=free_memory(subject.device),
        )
        self.seconds: dict[str, float] = {}
        self.maps: list[dict[str, Any]] = []

    def plans(self, shares: Sequence[float]) -> Iterator[tuple[str, float, SkipPlan]]:
        options = self._subject.options
        for way in options.policies or (*WAYS, SKIPPED):
            made = self._skipped if way == SKIPPED else self._windowed
            for share, plan in made(way, shares).items():
                if options.keep is not None:
                    name = f"{way.replace(', ', '_').replace(' ', '_')}_{share}.json"
                    plan.save(options.keep / name)
                yield way, share, plan

    def _windowed(self, way: str, shares: Sequence[float]) -> dict[float, SkipPlan]:
        loss, context = self._loss, self._subject.length
        policy = Windowed(loss, loss.kv_heads, self._window, context=context, **WAYS[way])
        start, judged = time.perf_counter(), loss.judged
        farthest = min(shares) if policy.start == "windowed" else max(shares)
        plans = policy.plans(self._profile, 1 / (1 - farthest))
        plans = sorted(plans, key=policy.alpha_of)
        took = self.seconds[way] = time.perf_counter() - start
        print(f"{way}: {took:.0f} s, {loss.judged - judged} plans judged", file=sys.stderr)
        self.maps.append(_map(way, plans, policy))
        enough = [[p for p in plans if policy.alpha_of(p) >= 1 / (1 - s) - 1e-9] for s in shares]
        return {share: some[0] for share, some in zip(shares, enough, strict=True)}

    def _skipped(self, way: str, shares: Sequence[float]) -> dict[float, SkipPlan]:
        return {s: _skipped(self._profile, s, len(self._loss.kv_heads)) for s in shares}


def _map(way: str, plans: Sequence[SkipPlan], policy: Windowed) -> dict[str, Any]:
    heads = {str(s): count for s, count in policy.heads.items()}
    return {"name": way, "heads": heads, "order": _order(plans, policy)}


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
