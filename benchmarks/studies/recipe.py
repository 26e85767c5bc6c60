"""How much the recipe keeps: a searched plan with fitted and refined surrogates, against AdaSkip.

Calibrated on some texts and evaluated on others, which have no book in common. Passkeys are hidden
in a text that was not calibrated on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from adaskip_fx.evaluation.evaluate import evaluate
from adaskip_fx.evaluation.tasks.passkey import Passkey
from adaskip_fx.fitting import Fitter, FittingSession, SurrogateSpec
from adaskip_fx.model.load import choose_device
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip, Fitted
from adaskip_fx.policies.adaskip import skip_count

from .quality import costs, decode_costs
from .setup import Options, Subject, Text, open_subject

PICTURES = ("plans",)
_KEPT = 3500  # tokens of a passkey's prompt


@dataclass(frozen=True)
class _Size:
    """How much is done.

    steps: of refinement, for each alpha. own: samples that the model writes. passkeys: to be found.
    shortlist: sublayers that a search tries at each step. judged: windows of each text.
    """

    steps: tuple[int, ...]
    own: int
    passkeys: int
    shortlist: int
    judged: int

    @classmethod
    def of(cls, subject: Subject) -> _Size:
        """What is asked for; little on a CPU."""
        steps, count = subject.options.steps, len(subject.options.alphas)
        if subject.device.type == "cuda":
            return cls(_each(steps or (1000,), count), 1024, 40, 16, 8)
        return cls(_each(steps or (2,), count), 2, 1, 2, 2)


def _each(values: tuple[int, ...], count: int) -> tuple[int, ...]:
    """So many; the last is repeated."""
    return (*values, *values[-1:] * count)[:count]


def measure(options: Options) -> dict[str, Any]:
    """Rows of every method at every alpha; on a GPU in bfloat16, for which attention is fast."""
    if options.dtype is None and choose_device(options.device).type == "cuda":
        options = replace(options, dtype="bfloat16")
    subject = open_subject(options)
    return {**subject.about(), **recipe(subject)}


def recipe(subject: Subject) -> dict[str, Any]:
    """Rows: what a method loses on each text, and how many passkeys it finds.

    The first half of each text that is calibrated on serves for that; all evaluation is on second
    halves.
    """
    size = _Size.of(subject)
    known = [t for t in subject.texts if t.name in subject.calibrated]
    judge = _Judge(subject, known, size)
    said, seconds = list[str](), dict[str, float]()
    rows: list[dict[str, Any]] = []
    plans: dict[tuple[str, int], SkipPlan] = {}
    for method, skipped, plan in _plans(subject, known, size, said, seconds):
        plans[method, skipped] = plan
        if subject.options.keep is not None:
            plan.save(subject.options.keep / f"{method.replace(', ', '_')}_{skipped}.json")
        about = {"method": method, "skipped": skipped, "plan": [str(s) for s in plan.prefill]}
        rows.append({**about, **judge(plan)})
        print(_line(rows[-1], judge.full["passkeys"]), file=sys.stderr, flush=True)
    return {
        "calibrated_on": [t.name for t in known],
        "full": judge.full,
        "rows": rows,
        "plans": [
            {"name": f"{method}, {skipped}", **plan.to_json()}
            for (method, skipped), plan in plans.items()
            if method in ("AdaSkip", "searched, fitted")
        ],
        "extras": _extras(subject, judge, plans),
        "size": asdict(size),
        "said": said,
        "seconds": seconds,
    }


def _plans(
    subject: Subject,
    known: Sequence[Text],
    size: _Size,
    said: list[str],
    seconds: dict[str, float],
) -> Iterator[tuple[str, int, SkipPlan]]:
    """(method, sublayers, plan); says what it does, and how long that takes."""

    def timed(what: str, do: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = do()
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - start
        return result

    begun_at = time.perf_counter()

    def say(words: str) -> None:
        said.append(words)
        print(f"{time.perf_counter() - begun_at:.0f} s: {words}", file=sys.stderr, flush=True)

    windows = {t.name: subject.windows(t, "first") for t in known}
    profile = subject.profile(known[0])
    counts = {skip_count(a, len(profile.sublayers)): a for a in subject.options.alphas}
    session = timed(
        "write",
        lambda: FittingSession(
            subject.model,
            subject.tokenizer,
            windows,
            synthetic_samples=size.own,
            max_length=subject.length,
            seed=subject.options.seed,
            say=say,
        ),
    )
    normalized = SurrogateSpec("normalized", ridge=1e-4)
    ordered = timed(
        "search",
        lambda: session.search(profile, max(counts.values()), normalized, shortlist=size.shortlist),
    )
    plain = Fitter(subject.model, subject.tokenizer, windows, max_length=subject.length)
    least = min(counts)
    for (count, alpha), steps in zip(counts.items(), size.steps, strict=False):
        similar = AdaSkip().plan(profile, alpha)
        yield "AdaSkip", count, similar
        if count == least:
            yield "AdaSkip, linear", count, plain.fit(similar, SurrogateSpec("linear"))
        begun = {"searched": ordered[count]}
        if "AdaSkip" in subject.options.policies:  # its choice with the same surrogates
            begun["AdaSkip"] = similar
        for name, plan in begun.items():
            fitted = timed("fit", lambda p=plan: session.fit(p, normalized))
            yield f"{name}, fitted", count, fitted
            refined = timed("refine", lambda p=fitted, n=steps: session.distill(p, n))
            yield f"{name}, refined", count, refined
            if count == least:
                extras = timed("extras", lambda p=refined: session.add_extras(p, normalized))
                yield f"{name}, refined, extras", count, extras


class _Judge:
    """What a plan loses on texts, and how many passkeys it finds."""

    def __init__(self, subject: Subject, known: Sequence[Text], size: _Size) -> None:
        self._subject = subject
        self.windows = {t.name: _second(subject, t, size.judged) for t in subject.texts}
        haystacks = [p for n, p in subject.options.texts if n not in {t.name for t in known}]
        length = min(_KEPT, 2 * subject.length)
        path = haystacks[0] if haystacks else None
        self._task = Passkey(samples=size.passkeys, length=length, path=path, seed=1)
        self.full = self(None)

    def __call__(self, plan: SkipPlan | None) -> dict[str, Any]:
        return {"texts": self._costs(plan), "passkeys": self._found(plan)}

    def _costs(self, plan: SkipPlan | None) -> dict[str, Any]:
        runtime, found = self._subject.runtime, {}
        for name, windows in self.windows.items():
            full, ours = costs(runtime, [plan] if plan is not None else [], windows)
            found[name] = ours[0].against(full) if plan is not None else full.against(full)
        return found

    def _found(self, plan: SkipPlan | None) -> float:
        runtime = self._subject.runtime
        runtime.plan = plan if plan is not None else SkipPlan.empty(runtime.sublayers)
        try:
            result = evaluate(self._subject.compiled, self._subject.tokenizer, [self._task])
        finally:
            runtime.plan = SkipPlan.empty(runtime.sublayers)
        return result.results[0].scores.mean


def _second(subject: Subject, text: Text, count: int) -> list[torch.Tensor]:
    """Windows of the second half; of a short text one of all there is."""
    half = text.tokens[len(text.tokens) // 2 :]
    if len(half) < subject.length:
        return [half.unsqueeze(0).to(subject.device)]
    windows = text.windows("second", count, subject.length)
    return [window.to(subject.device) for window in windows]


def _extras(
    subject: Subject, judge: _Judge, plans: dict[tuple[str, int], SkipPlan]
) -> list[dict[str, Any]]:
    """Perplexity of decoding with the most that a window can add, against that without it."""
    rows, steps = [], subject.decoded
    for (method, skipped), plan in plans.items():
        if not method.endswith(", extras"):
            continue
        extras = Fitted(plan).extras
        more = plan.with_decode_extra(extras)
        row: dict[str, Any] = {"method": method, "skipped": skipped, "added": len(extras)}
        row["texts"] = {}
        for name, windows in judge.windows.items():
            _, both = decode_costs(subject.runtime, [plan, more], windows[:2], steps)
            row["texts"][name] = both[1].against(both[0])["perplexity_ratio"]
        rows.append(row)
    return rows


def _line(row: dict[str, Any], full: float) -> str:
    texts = ", ".join(
        f"{name} {cost['perplexity_ratio']:.3f}x (KL {cost['kl']:.3f})"
        for name, cost in row["texts"].items()
    )
    found = row["passkeys"] / full if full else float("nan")
    return f"{row['method']}, {row['skipped']}: {texts}; passkeys {found:.2f} of full"


def summary(result: dict[str, Any]) -> str:
    """What was found, in a few lines."""
    full = result["full"]["passkeys"]
    lines = [
        f"calibrated on {', '.join(result['calibrated_on'])}; passkeys of the model: {full:.3f}"
    ]
    lines += [_line(row, full) for row in result["rows"]]
    for row in result["extras"]:
        worst = max(row["texts"].values())
        lines.append(f"{row['method']}: {row['added']} extras, at worst {worst:.3f}x perplexity")
    lines.append(", ".join(f"{what} {s:.0f} s" for what, s in result["seconds"].items()))
    return "\n".join(lines)
