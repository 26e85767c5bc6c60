"""Fit surrogates in the order of the plan, towards the full model's stream.

For each skipped sublayer, first to last, texts run through two programs: one that skips, with what
was fitted for the sublayers before it, gives the stream x that this one's surrogate will see; the
full model gives the stream y that there should be after it. So later surrogates see compensated
inputs, and make good what earlier ones left. What lies behind the sublayer is left out of both
programs. A plan is linked in milliseconds, so none of this compiles anything.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from adaskip_fx.api import build
from adaskip_fx.calibration.calibrate import tokenize
from adaskip_fx.model.check_model import check_model
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import Action, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.programs.instruments import ResidualRecorder
from adaskip_fx.runtime.runtime import Runtime

from .second_moments import SecondMoments
from .spec import SurrogateSpec

#: texts, or token ids int64 [1, T]; or several kinds of them, by name
Texts = Iterable[str | torch.Tensor] | Mapping[str, Iterable[str | torch.Tensor]]
_FOLDS = 5  # that texts of one kind are dealt out to
_KEPT = 64  # surrogates that a fitter remembers


class Fitter:
    """A model and calibration texts, to fit surrogates for one plan after the other.

    Args:
        model: a transformers decoder in evaluation mode; it is not changed.
        tokenizer: the model's.
        texts: as of :func:`adaskip_fx.calibrate`, or by kind (prose, code, ...), so that ridge and
            rank are chosen to hold for kinds that were not seen.
        max_length: tokens of a text at most.
        backend: inner torch.compile backend.
        together: sublayers whose moments are taken in one pass, where they do not see each other.

    Attributes:
        runtime: of the compiled model that it runs.
        samples: token ids int64 [1, T].
        folds: for each sample the fold that it is in.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        texts: Texts,
        *,
        max_length: int = 2048,
        backend: str = "eager",
        together: int = 16,
    ) -> None:
        check_model(model)
        self._source = model, tokenizer, max_length
        self.runtime: Runtime = runtime_of(build(model, None, backend=backend))
        self.together = together
        self._take(texts)

    def on(self, texts: Texts) -> Fitter:
        """The same compiled model with other texts."""
        twin = copy.copy(self)
        twin._take(texts)
        return twin

    @property
    def tokens(self) -> int:
        """Of all samples together."""
        return sum(ids.shape[1] for ids in self.samples)

    def _take(self, texts: Texts) -> None:
        pairs = _dealt(texts)
        if not pairs:
            raise ValueError("no text was given to fit on; pass at least one")
        model, tokenizer, longest = self._source
        found = (_ids(model, tokenizer, text, longest) for _, text in pairs)
        self.samples = [ids.to(model.device) for ids in found]
        self.folds = [fold for fold, _ in pairs]
        self._fitted: dict[tuple[object, ...], Surrogate] = {}

    def fit(
        self,
        plan: SkipPlan,
        rung: SurrogateSpec | Mapping[Sublayer, SurrogateSpec] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SkipPlan:
        """`plan` with surrogates for all that prefill does not run, fitted in its order.

        Args:
            plan: which; what stands in there already for other sublayers is kept.
            rung: what kind, for all or for each; linear maps if None.
            progress: called with (sublayers done, sublayers in all).
        """
        left_out = _left_out(plan)
        done: dict[Sublayer, Surrogate] = {}
        for number, sublayer in enumerate(left_out):
            if progress is not None:
                progress(number, len(left_out))
            kind = (
                rung.get(sublayer, SurrogateSpec())
                if isinstance(rung, Mapping)
                else rung or SurrogateSpec()
            )
            done[sublayer] = self._next(done, sublayer, kind)
        if progress is not None:
            progress(len(left_out), len(left_out))
        return plan.with_surrogates(plan.surrogates.merged(Surrogates(done)))

    def _next(
        self, done: dict[Sublayer, Surrogate], sublayer: Sublayer, rung: SurrogateSpec
    ) -> Surrogate:
        """What stands in for `sublayer`, after those before it; plans begin alike in a search."""
        key = (*((s, c.digest) for s, c in done.items()), sublayer, rung)
        found = self._fitted.pop(key, None)
        if found is None:
            moments = self.moments(Surrogates(done), tuple(done), [sublayer], rung)
            found = rung.fit(moments[sublayer], rung.most(sublayer))
        self._fitted[key] = found  # as the last one used
        while len(self._fitted) > _KEPT:
            del self._fitted[next(iter(self._fitted))]
        return found

    def beside(
        self, plan: SkipPlan, rung: SurrogateSpec | None = None, kinds: Sequence[str] = ("ffn",)
    ) -> Surrogates:
        """A surrogate for every sublayer that still runs, as if it alone were skipped besides.

        They do not see each other: one pass over the texts serves several. For FFN sublayers that a
        request may add while it decodes, and for a search that tries one after the other.

        Args:
            plan: with its surrogates.
            rung: what kind; linear maps if None.
            kinds: of the sublayers.
        """
        left_out = _left_out(plan)
        running = [s for s in plan.sublayers if s not in left_out and s.kind in kinds]
        return self._apart(plan.surrogates, left_out, running, rung or SurrogateSpec())

    def alone(self, plan: SkipPlan, rung: SurrogateSpec | None = None) -> SkipPlan:
        """`plan` with surrogates, each as if it alone were skipped.

        They do not see each other: one pass over the texts serves several, so that this takes a
        small part of the time of `fit`.

        Args:
            plan: which; what stands in there already for other sublayers is kept.
            rung: what kind; linear maps if None.
        """
        fitted = self._apart(Surrogates(), (), _left_out(plan), rung or SurrogateSpec())
        return plan.with_surrogates(plan.surrogates.merged(fitted))

    def _apart(
        self,
        surrogates: Surrogates,
        left_out: Sequence[Sublayer],
        wanted: Sequence[Sublayer],
        rung: SurrogateSpec,
    ) -> Surrogates:
        fitted: dict[Sublayer, Surrogate] = {}
        for start in range(0, len(wanted), self.together):
            group = wanted[start : start + self.together]
            found = self.moments(surrogates, left_out, group, rung)
            fitted.update({s: rung.fit(moments, rung.most(s)) for s, moments in found.items()})
        return Surrogates(fitted)

    def moments(
        self,
        surrogates: Surrogates,
        left_out: Sequence[Sublayer],
        wanted: Sequence[Sublayer],
        rung: SurrogateSpec,
    ) -> dict[Sublayer, list[SecondMoments]]:
        """For each of `wanted` the moments of each fold.

        Args:
            surrogates: what stands in already.
            left_out: what is skipped; of what lies behind all of `wanted` nothing is run.
            wanted: sublayers, skipped or not.
            rung: says whether a normalized stream is looked at.
        """
        sublayers = self.runtime.sublayers
        place = {s: i for i, s in enumerate(sublayers)}
        behind = sublayers[max(map(place.__getitem__, wanted)) + 1 :]
        skipping = SkipPlan.of(sublayers, (*left_out, *behind), surrogates=surrogates)
        full = SkipPlan.of(sublayers, behind)
        found: dict[Sublayer, list[SecondMoments]] = {}
        for ids, fold in zip(self.samples, self.folds, strict=True):
            seen, wished = (self._streams(ids, p) for p in (skipping, full))
            for s in wanted:
                if s not in found:
                    kind = seen[0].shape[-1], seen[0].device, rung.kind == "normalized"
                    found[s] = [SecondMoments.zeros(*kind) for _ in range(max(self.folds) + 1)]
                found[s][fold].add(seen[place[s]], wished[place[s] + 1])
        return found

    @torch.no_grad()
    def _streams(self, ids: torch.Tensor, plan: SkipPlan) -> tuple[torch.Tensor, ...]:
        recorder = ResidualRecorder()
        cache = self.runtime.new_cache(ids.shape[1], plan=plan, instrument=recorder)
        self.runtime.step(ids, None, None, cache, 1)
        return recorder.streams


def _left_out(plan: SkipPlan) -> tuple[Sublayer, ...]:
    return tuple(s for s in plan.sublayers if plan.action("prefill", s) is not Action.RUN)


def _ids(model: Any, tokenizer: Any, text: str | torch.Tensor, longest: int) -> torch.Tensor:
    if isinstance(text, torch.Tensor):
        return text[:, :longest]
    return tokenize(model, tokenizer, [text], longest)[0]


def _dealt(texts: Texts) -> list[tuple[int, str | torch.Tensor]]:
    """Each text with the fold that it is in: its kind's, or one of five in turn."""
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of texts, not one string")
    if not isinstance(texts, Mapping):
        return [(i % _FOLDS, text) for i, text in enumerate(texts)]
    if len(texts) == 1:
        return _dealt(next(iter(texts.values())))
    return [(fold, text) for fold, group in enumerate(texts.values()) for text in group]
