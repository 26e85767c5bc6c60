"""What a demo found, as plain data: the printed tables and the JSON come from the same objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.profiles.profile import Profile

#: The four ways one model is run, and what they are called in tables.
CONTENDERS: Mapping[str, str] = {
    "as_is": "as is",
    "empty_plan": "empty plan",
    "skipped": "skipped",
    "fitted": "fitted",
}


@dataclass(frozen=True)
class Options:
    """What a demo measures and how much of it.

    Attributes:
        alpha: acceleration ratio.
        backend: inner torch.compile backend.
        prompts, prompt_tokens: passkey texts, and the least number of tokens of each.
        new_tokens: decoded for each text; more than the decode window.
        calibration, held_out: (samples, tokens of each).
        link_repeats: new plans to link when timing that.
        seed: of the texts; nothing else is drawn.
    """

    alpha: float = 1.2
    backend: str = "inductor"
    prompts: int = 5
    prompt_tokens: int = 2000
    new_tokens: int = 32
    calibration: tuple[int, int] = (6, 1024)
    held_out: tuple[int, int] = (2, 768)
    link_repeats: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One contender's answer to one passkey text.

    Attributes:
        key, depth: the pass key and where it was hidden, from 0 (at the beginning) to 1.
        text: what the model generated.
        found: whether the pass key is in it.
        prefill_seconds: from the call of ``generate`` to the first token.
        step_seconds: each decoded token after that.
        cache_bytes: K/V storage of the request at its end.
    """

    key: str
    depth: float
    text: str
    found: bool
    prefill_seconds: float
    step_seconds: tuple[float, ...]
    cache_bytes: int


@dataclass(frozen=True)
class Contender:
    """All answers of one of the four ways to run the model, in the order of the texts.

    Attributes:
        answers: one a text.
        window: steps that the decode window takes; in the skipped model they are probed.
    """

    answers: tuple[Answer, ...]
    window: int

    @property
    def prefill_seconds(self) -> float:
        """Median over the texts."""
        return median(a.prefill_seconds for a in self.answers)

    @property
    def window_step_seconds(self) -> float:
        """Median over texts of the median step within the decode window."""
        return median(median(a.step_seconds[: self.window]) for a in self.answers)

    @property
    def later_step_seconds(self) -> float:
        """Median over texts of the median step after the decode window."""
        # The first of them may link the plan that the window has led to.
        return median(median(a.step_seconds[self.window + 1 :]) for a in self.answers)

    @property
    def found(self) -> int:
        """Pass keys found."""
        return sum(a.found for a in self.answers)

    @property
    def cache_bytes(self) -> int:
        """Median over the texts."""
        return round(median(a.cache_bytes for a in self.answers))

    def to_json(self) -> dict[str, Any]:
        return {
            "prefill_seconds": self.prefill_seconds,
            "window_step_seconds": self.window_step_seconds,
            "later_step_seconds": self.later_step_seconds,
            "passkeys_found": self.found,
            "cache_bytes": self.cache_bytes,
            "answers": [asdict(a) for a in self.answers],
        }


@dataclass(frozen=True)
class Quality:
    """A model that skips against the model as is, on held-out text, with the prefill's plan.

    Attributes:
        tokens: predicted.
        perplexity, perplexity_skipped: of the model as is and of the other.
        agreement: share of tokens for which both predict the same.
    """

    tokens: int
    perplexity: float
    perplexity_skipped: float
    agreement: float

    @property
    def ratio(self) -> float:
        return self.perplexity_skipped / self.perplexity

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Counts:
    """What a compiled model had done at some point."""

    captures: int
    pieces: int
    links: int
    dropped: int
    compile_seconds: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that a demo measured.

    Attributes:
        conditions: model, machine, versions and options.
        seconds: of loading, calibration, warm-up and the other steps; not part of any time below.
        profile: what calibration measured.
        plan: what prefill skips.
        learned: the decode plan of each text after its window.
        contenders: by the keys of `CONTENDERS`.
        quality: on held-out text, of those that skip.
        after_warmup, after_answers, at_end: counts of the skipped model.
        link_seconds: for each of several new plans.
        pieces_for_new_plans: compiled while linking them.
    """

    conditions: Mapping[str, Any]
    seconds: Mapping[str, float]
    profile: Profile
    plan: SkipPlan
    learned: tuple[SkipPlan, ...]
    contenders: Mapping[str, Contender]
    quality: Mapping[str, Quality]
    after_warmup: Counts
    after_answers: Counts
    at_end: Counts
    link_seconds: tuple[float, ...]
    pieces_for_new_plans: int

    def extra(self, sublayer: Sublayer) -> int:
        """In how many texts decode skipped `sublayer` on top of what prefill skips."""
        if sublayer in self.plan.prefill:
            return 0
        return sum(sublayer in plan.skipped("decode") for plan in self.learned)

    def to_json(self) -> dict[str, Any]:
        """One JSON-compatible object; times in seconds, storage in bytes."""
        rows = zip(
            self.profile.sublayers, self.profile.similarity(), self.profile.scale(), strict=True
        )
        return {
            "conditions": dict(self.conditions),
            "seconds": dict(self.seconds),
            "profile": {
                "digest": self.profile.digest,
                "tokens": self.profile.tokens,
                "sublayers": [
                    {"sublayer": str(s), "similarity": float(similarity), "scale": float(scale)}
                    for s, similarity, scale in rows
                ],
            },
            "plan": self.plan.to_json(),
            "learned": [plan.to_json() for plan in self.learned],
            "contenders": {name: c.to_json() for name, c in self.contenders.items()},
            "quality": {name: q.to_json() for name, q in self.quality.items()},
            "counts": {
                "after_warmup": asdict(self.after_warmup),
                "after_answers": asdict(self.after_answers),
                "at_end": asdict(self.at_end),
            },
            "new_plans": {
                "link_seconds": list(self.link_seconds),
                "pieces_compiled": self.pieces_for_new_plans,
            },
        }
