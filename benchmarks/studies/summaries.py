"""Summaries end to end: what ROUGE-L loses, against measured speed.

There are no summaries written by people at hand: the reference is the full model's own greedy
summary, so what is measured is how far skipping leads away from the full model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from statistics import mean, median
from types import MappingProxyType
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from adaskip_fx.data.reference_text import prompt_ids
from adaskip_fx.fitting import SurrogateSpec
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip, Fitted, OnlinePolicy

from .fits import fitter
from .quality import decoded
from .setup import Options, Subject, Text, open_subject

PICTURES = ("pareto",)
_QUESTION = "\n\nSummarize the text above in a few sentences."
_SPECIAL = 64  # tokens for the question and the chat template
Score = Callable[[str, str], float]
Method = tuple[OnlinePolicy, SkipPlan]  #: what a request may add, and what it begins with


def measure(options: Options) -> dict[str, Any]:
    """ROUGE-L and speed at every alpha."""
    score = rouge_l()  # before minutes of work
    subject = open_subject(options, timed=True)
    tokens = 96 if subject.device.type == "cuda" else 64
    return {**subject.about(), **summaries(subject, score, tokens)}


def rouge_l() -> Score:
    """F-measure of ROUGE-L with stemming, of (reference, summary); ValueError: no package."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "rouge_score":
            raise
        raise ValueError(
            "summaries are scored by rouge-score, which is not installed. Run: pip install "
            "'adaskip-fx[eval]'"
        ) from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda reference, summary: float(scorer.score(reference, summary)["rougeL"].fmeasure)


@dataclass
class _Clock(BaseStreamer):  # type: ignore[misc]  # transformers is not typed
    """Notes when each token arrives; ``generate`` hands it the prompt first."""

    ticks: list[float] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Summary:
    """What was generated for one document.

    ids: prompt and summary, int64 [1, T]; new: tokens of the summary; prefill, step: seconds of the
    prompt, and of a step in the median.
    """

    text: str
    ids: torch.Tensor
    new: int
    prefill: float
    step: float


def summaries(subject: Subject, score: Score, tokens: int) -> dict[str, Any]:
    """Points as the picture takes them; profiles and fits are of the first half of a text.

    ``agreement``: along the full model's summary, how often the next token is the same one. (Two
    greedy summaries part for good at the first token that differs.)
    ``levels``: ROUGE-L between full summaries of different documents, what no relation gives.
    """
    documents = [(text, ids) for text in subject.texts for ids in _prompts(subject, text)]
    empty = AdaSkip(), SkipPlan.empty(subject.runtime.sublayers)
    full = _generate_all(subject, documents, [empty] * len(documents), tokens)
    points = []
    for about, known in _contenders(subject):
        plans = [known[text][1] for text, _ in documents]
        ours = _generate_all(subject, documents, [known[text] for text, _ in documents], tokens)
        scores = [score(a.text, b.text) for a, b in zip(full, ours, strict=True)]
        points.append(
            {
                **about,
                "skipped": len(plans[0].skipped("prefill")),
                "quality": mean(scores),
                "rouge_l_loss": 1 - mean(scores),
                "scores": scores,
                "agreement": mean(map(partial(_agreement, subject), plans, full)),
                "speedup": _speedup(full, ours),
                "examples": [one.text for one in ours[:3]],
            }
        )
    return {
        "quality_name": "ROUGE-L to the full model's summary",
        "lower_is_better": False,
        "reference": "the full model's own greedy summary; there are no gold summaries",
        "documents": len(documents),
        "new_tokens": tokens,
        "levels": {"another document's summary": _chance(full, score)},
        "points": points,
        "full_examples": [one.text for one in full[:3]],
    }


def _contenders(subject: Subject) -> Iterator[tuple[dict[str, Any], dict[Text, Method]]]:
    """What a point is of, and the method for each text; saved plans come last."""
    for alpha, (kind, method) in product(subject.options.alphas, _METHODS.items()):
        about = {"policy": "AdaSkip", "compensation": kind, "alpha": alpha}
        yield about, {text: method(subject, text, alpha) for text in subject.texts}
    for name, path in subject.options.plans:
        plan = SkipPlan.load(path)
        about = {"policy": name, "compensation": plan.surrogates.kinds, "alpha": None}
        yield about, dict.fromkeys(subject.texts, (Fitted(plan), plan))


def _by_factors(subject: Subject, text: Text, alpha: float) -> Method:
    """AdaSkip as published: it adds FFN sublayers online."""
    return AdaSkip(), AdaSkip().plan(subject.profile(text), alpha)


def _by_maps(subject: Subject, text: Text, alpha: float) -> Method:
    """Its choice with normalized maps, fitted in one pass; nothing is added online."""
    plan = AdaSkip().plan(subject.profile(text), alpha)
    fitted = fitter(subject, text).fit_independently(plan, SurrogateSpec("normalized"))
    return Fitted(fitted), fitted


_METHODS = MappingProxyType({"scale": _by_factors, "normalized": _by_maps})


def _prompts(subject: Subject, text: Text) -> list[torch.Tensor]:
    """Documents of the second half of a text, asked about by the chat template."""
    length = max(subject.length - _SPECIAL, 32)
    found = []
    for ids in text.windows("second", subject.samples, length):
        document = subject.tokenizer.decode(ids[0].tolist())
        asked = prompt_ids(subject.tokenizer, document + _QUESTION)
        found.append(torch.tensor([asked], device=subject.device))
    return found


def _generate_all(
    subject: Subject,
    documents: Sequence[tuple[Text, torch.Tensor]],
    methods: Sequence[Method],
    tokens: int,
) -> list[Summary]:
    """Greedy summaries, with a policy's online step; the first document twice, to warm up."""
    runtime = subject.runtime
    before = runtime.plan, runtime.policy, runtime.profile
    found = []
    try:
        for number in (0, *range(len(documents))):
            text, ids = documents[number]
            runtime.policy, runtime.plan = methods[number]
            runtime.profile = subject.profile(text)
            found.append(_generate(subject, ids, tokens))
    finally:
        runtime.plan, runtime.policy, runtime.profile = before
    return found[1:]


def _generate(subject: Subject, ids: torch.Tensor, tokens: int) -> Summary:
    clock = _Clock()
    start = time.perf_counter()
    output = subject.compiled.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens // 2,  # a small model that skips may end at once
        do_sample=False,
        streamer=clock,
    )
    text = subject.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    first, *_ = arrived = clock.ticks[1:]
    steps = [b - a for a, b in pairwise(arrived)]
    new = output.shape[1] - ids.shape[1]
    return Summary(text, output, new, first - start, median(steps) if steps else 0.0)


def _agreement(subject: Subject, plan: SkipPlan, full: Summary) -> float:
    """The share of a full summary's tokens that the plan finds likeliest after those before."""
    predicted = decoded(subject.runtime, plan, full.ids, full.new).argmax(-1)
    return float((predicted == full.ids[0, -full.new :]).double().mean())


def _speedup(full: Sequence[Summary], ours: Sequence[Summary]) -> dict[str, float]:
    """By medians over the documents; a summary of a single token has no steps."""
    steps = [median([s.step for s in some if s.step] or [0.0]) for some in (full, ours)]
    found = {"prefill": median(s.prefill for s in full) / median(s.prefill for s in ours)}
    return {**found, "decode": steps[0] / steps[1]} if all(steps) else found


def _chance(full: Sequence[Summary], score: Score) -> float | None:
    """Neighbours in the list, the last with the first."""
    if len(full) < 2:
        return None
    return mean(score(a.text, b.text) for a, b in zip(full, (*full[1:], full[0]), strict=True))


def summary(result: dict[str, Any]) -> str:
    """What was found, in a few lines."""
    (chance,) = result["levels"].values()
    lines = [
        f"{result['documents']} documents, reference: {result['reference']}; ROUGE-L by chance "
        + ("-" if chance is None else f"{chance:.3f}")
    ]
    for point in result["points"]:
        speeds = ", ".join(f"{phase} {x:.2f}x" for phase, x in point["speedup"].items())
        lines.append(
            f"{point['policy']} ({point['skipped']} skipped, {point['compensation']}): "
            f"ROUGE-L {point['quality']:.3f}, loss {point['rouge_l_loss']:.3f}, same next token "
            f"{point['agreement']:.3f}, {speeds}"
        )
    return "\n".join(lines)
