"""Where plans of windows come from: searches by different ways, or files that a search has left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.fitting.choose_windows import WindowRecipe, answerable_questions, free_memory
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window
from adaskip_fx.policies import Windowed, WindowedBySimilarity
from adaskip_fx.profiles.head_windows import HeadWindows
from adaskip_fx.profiles.profile import Profile
from adaskip_fx.runtime.similarity import measure_windows

from .setup import Subject, Text

#: Name -> options of `Windowed`; ``--policy`` chooses among them, `ALONE` and `SKIPPED`.
WAYS: Mapping[str, dict[str, Any]] = {
    "heads": {},
    "heads, forward": {"shortlist": 4},
    "heads, backward": {"shortlist": 4, "start": "windowed"},
    "layers, forward": {"per": "layer", "shortlist": 4},
}
SKIPPED, ALONE = "attention skipped", "profile alone"
_QUESTIONS = 8  # for each sample of a text


class Source(Protocol):
    """Where plans come from.

    Attributes:
        seconds: that each way took.
        maps: of each way the order in which units got windows.
    """

    seconds: dict[str, float]
    maps: list[dict[str, Any]]

    def plans(self, shares: Sequence[float]) -> Iterator[tuple[str, float, SkipPlan]]:
        """Return way, share and plan of those that are wanted."""


class Given:
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


class Search:
    """Finds a plan for each way and share."""

    def __init__(self, subject: Subject, known: Sequence[Text], window: Window) -> None:
        self._subject, self._window = subject, window
        self._text = known[0]
        self._profile = subject.profile(self._text)
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
        others = {SKIPPED: self._skipped, ALONE: self._by_profile}
        for way in options.policies or (*WAYS, ALONE, SKIPPED):
            for share, plan in others.get(way, self._windowed)(way, shares):
                if options.keep is not None:
                    name = f"{way.replace(', ', '_').replace(' ', '_')}_{share}.json"
                    plan.save(options.keep / name)
                yield way, share, plan

    def _windowed(self, way: str, shares: Sequence[float]) -> Iterator[tuple[float, SkipPlan]]:
        """Yield each plan as soon as it is found: a loss that is known is not judged again."""
        loss, context = self._loss, self._subject.length
        policy = Windowed(loss, loss.kv_heads, self._window, context=context, **WAYS[way])
        start, judged, plans = time.perf_counter(), loss.judged, tuple[SkipPlan, ...]()
        for share in sorted(shares, reverse=policy.start == "windowed"):
            plans = policy.plans(self._profile, 1 / (1 - share))
            took = self.seconds[way] = time.perf_counter() - start
            count = loss.judged - judged
            print(f"{way} {share}: {took:.0f} s, {count} judged", file=sys.stderr, flush=True)
            yield share, plans[-1]
        self.maps.append(_map(way, sorted(plans, key=policy.alpha_of), policy))

    def _by_profile(self, way: str, shares: Sequence[float]) -> Iterator[tuple[float, SkipPlan]]:
        """Yield plans of one run of each text that the profile was measured on."""
        start, heads, context = time.perf_counter(), self._loss.kv_heads, self._subject.length
        plans = similar(self._subject, self._text, self._window, 1 / (1 - max(shares)))
        self.seconds[way] = time.perf_counter() - start
        count = Windowed(self._loss, heads, self._window, context=context)
        self.maps.append(_map(way, plans, count))
        for share in shares:
            enough = (p for p in plans if count.alpha_of(p) >= 1 / (1 - share) - 1e-9)
            yield share, next(enough)

    def _skipped(self, way: str, shares: Sequence[float]) -> Iterator[tuple[float, SkipPlan]]:
        for share in shares:
            count = round(share * len(self._loss.kv_heads))
            yield share, attention_skipped(self._profile, count)


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


def similar(subject: Subject, text: Text, window: Window, alpha: float) -> tuple[SkipPlan, ...]:
    """Return plans that grow up to `alpha`, by one run of each window of a text's first half."""
    runtime, profile = subject.runtime, subject.profile(text)
    changes = [
        measure_windows(runtime, ids, [window])[1][:, :, 0].double().cpu().numpy()
        for ids in subject.windows(text, "first")
    ]
    heads = HeadWindows((window,), runtime.graphs.structure.kv_heads, np.stack(changes))
    policy = WindowedBySimilarity(window, context=subject.length)
    return policy.plans(replace(profile, windows=heads), alpha)


def attention_skipped(profile: Profile, count: int) -> SkipPlan:
    """Return the plan that skips so many attention sublayers, the most similar, with scales."""
    similarity = dict(zip(profile.sublayers, profile.similarity().tolist(), strict=True))
    attention = sorted(
        (s for s in profile.sublayers if s.kind == "attention"), key=lambda s: -similarity[s]
    )
    skip = attention[:count]
    scales = profile.scales().factors
    factors = {s: scales[s] for s in skip if s in scales}
    return SkipPlan.of(profile.sublayers, skip, surrogates=Surrogates.scale(factors))
