"""Fit surrogates in the order of the plan, towards the full model's stream.

For each skipped sublayer, first to last, texts run through two programs. One skips, with the
surrogates that were fitted for the sublayers before it, and gives the stream x that this one's
surrogate will see; the full model gives the stream y that there should be after it. So later
surrogates see what earlier ones make of the stream, and correct what those left. Sublayers behind
it are skipped in both programs. A plan is linked in milliseconds, so none of this compiles
anything.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from adaskip_fx.api import build
from adaskip_fx.calibration.calibrate import token_digest, tokenize
from adaskip_fx.calibration.tokenizer import Tokenizer
from adaskip_fx.model.check_model import check_model
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.parallel.replicas import DataParallel, replicas_of
from adaskip_fx.plans.skip_plan import Action, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.profiles.fingerprint import fingerprint
from adaskip_fx.programs.instruments import ResidualRecorder
from adaskip_fx.runtime.runtime import Runtime

from .second_moments import SecondMoments
from .spec import SurrogateSpec

#: texts, or token ids int64 [1, T]; or several kinds of them, by name
Texts = Iterable[str | torch.Tensor] | Mapping[str, Iterable[str | torch.Tensor]]
_FOLDS = 5  # of cross-validation, for texts of one kind
_CACHED = 64  # surrogates that a fitter remembers


class Fitter:
    """A model and calibration texts, to fit surrogates for one plan after the other.

    Args:
        model: a transformers decoder in evaluation mode; it is not changed.
        tokenizer: the model's.
        texts: as for :func:`adaskip_fx.calibrate`, or by kind (prose, code, ...), so that ridge and
            rank are chosen to hold for kinds that were not seen.
        max_length: tokens of a text at most.
        backend: inner torch.compile backend.
        group_size: sublayers whose moments are taken in one pass, where they do not see each other.
        data_parallel: share the texts among processes, as for :func:`adaskip_fx.calibrate`.

    Attributes:
        replicas: the processes that share the texts.
        runtime: of the compiled model that it runs.
        samples: token ids int64 [1, T].
        folds: for each sample the cross-validation fold that it is in: its kind's, or, where there
            is one kind, one of five in turn.

    Raises:
        ValueError: no texts.
        TypeError: one string instead of several texts.
        RanksError: processes have other models or texts, or one is gone.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        texts: Texts,
        *,
        max_length: int = 2048,
        backend: str = "eager",
        group_size: int = 16,
        data_parallel: DataParallel = False,
    ) -> None:
        self.replicas = replicas_of(model, data_parallel)
        model = self.replicas.ranks.apart("preparing to fit", lambda: check_model(model))
        known = fingerprint(model)
        self.replicas.check_model(known.weights, known.digest, model.dtype)
        self._source = model, tokenizer, max_length
        self.runtime: Runtime = self.replicas.ranks.apart(
            "compiling to fit", lambda: runtime_of(build(model, None, backend=backend))
        )
        self.group_size = group_size
        self._set_texts(texts)

    def with_texts(self, texts: Texts) -> Fitter:
        """Return a fitter that shares the compiled model and has other texts."""
        other = copy.copy(self)
        other._set_texts(texts)
        return other

    @property
    def tokens(self) -> int:
        """How many tokens all samples have together."""
        return sum(ids.shape[1] for ids in self.samples)

    def _set_texts(self, texts: Texts) -> None:
        read = partial(_read, *self._source, texts)
        self.samples, self.folds = self.replicas.ranks.apart("the texts to fit on", read)
        for ranks in (self.replicas.ranks, self.runtime.ranks):
            ranks.agree("the texts to fit on", (token_digest(self.samples), self.folds))
        self._fitted: dict[tuple[object, ...], Surrogate] = {}

    def fit(
        self,
        plan: SkipPlan,
        spec: SurrogateSpec | Mapping[Sublayer, SurrogateSpec] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SkipPlan:
        """Return `plan` with surrogates for all that prefill does not run, fitted in its order.

        Args:
            plan: what is skipped; its surrogates of other sublayers are kept.
            spec: what kind of surrogate to fit, for all sublayers or for each; linear maps if None.
            progress: called with (sublayers done, sublayers in all).

        Raises:
            ValueError: there is nothing to fit on, or a scale would not be positive.
        """
        skipped = _skipped(plan)
        done: dict[Sublayer, Surrogate] = {}
        for number, sublayer in enumerate(skipped):
            if progress is not None:
                progress(number, len(skipped))
            of_sublayer = spec.get(sublayer) if isinstance(spec, Mapping) else spec
            done[sublayer] = self._fit_next(done, sublayer, of_sublayer or SurrogateSpec())
        if progress is not None:
            progress(len(skipped), len(skipped))
        return plan.with_surrogates(plan.surrogates.merged(Surrogates(done)))

    def _fit_next(
        self, done: dict[Sublayer, Surrogate], sublayer: Sublayer, spec: SurrogateSpec
    ) -> Surrogate:
        """Return the surrogate of `sublayer`, after those before it.

        The last ones are cached: in a search plans begin alike.
        """
        key = (*((s, c.digest) for s, c in done.items()), sublayer, spec)
        surrogate = self._fitted.pop(key, None)
        if surrogate is None:
            moments = self.second_moments(Surrogates(done), tuple(done), [sublayer], spec)
            surrogate = self._solved(spec, sublayer, moments[sublayer])
        self._fitted[key] = surrogate  # as the last one used
        while len(self._fitted) > _CACHED:
            del self._fitted[next(iter(self._fitted))]
        return surrogate

    def fit_running(
        self, plan: SkipPlan, spec: SurrogateSpec | None = None, kinds: Sequence[str] = ("ffn",)
    ) -> Surrogates:
        """Return a surrogate for every sublayer that still runs, as if it alone were skipped too.

        They do not see each other, so that one pass over the texts serves several. They are for FFN
        sublayers that a request may add while it decodes, and for a search that tries one after the
        other.

        Args:
            plan: what is skipped, with its surrogates.
            spec: what kind of surrogate to fit; linear maps if None.
            kinds: of the sublayers.
        """
        skipped = _skipped(plan)
        running = [s for s in plan.sublayers if s not in skipped and s.kind in kinds]
        return self._fit_apart(plan.surrogates, skipped, running, spec or SurrogateSpec())

    def fit_independently(self, plan: SkipPlan, spec: SurrogateSpec | None = None) -> SkipPlan:
        """Return `plan` with surrogates, each fitted as if its sublayer alone were skipped.

        They do not see each other, so that one pass over the texts serves several, and this takes a
        small part of the time of `fit`.

        Args:
            plan: what is skipped; its surrogates of other sublayers are kept.
            spec: what kind of surrogate to fit; linear maps if None.
        """
        fitted = self._fit_apart(Surrogates(), (), _skipped(plan), spec or SurrogateSpec())
        return plan.with_surrogates(plan.surrogates.merged(fitted))

    def _fit_apart(
        self,
        surrogates: Surrogates,
        skipped: Sequence[Sublayer],
        wanted: Sequence[Sublayer],
        spec: SurrogateSpec,
    ) -> Surrogates:
        fitted: dict[Sublayer, Surrogate] = {}
        for start in range(0, len(wanted), self.group_size):
            group = wanted[start : start + self.group_size]
            moments = self.second_moments(surrogates, skipped, group, spec)
            fitted.update({s: self._solved(spec, s, m) for s, m in moments.items()})
        return Surrogates(fitted)

    def _solved(
        self, spec: SurrogateSpec, sublayer: Sublayer, folds: list[SecondMoments]
    ) -> Surrogate:
        """Return the surrogate of a sublayer, the first process' on all of them."""
        what = f"the surrogate of {sublayer}"
        solve = partial(spec.fit, folds, spec.largest_rank(sublayer))
        of_model = partial(self.runtime.ranks.first, what, solve)
        return self.replicas.ranks.first(what, of_model)

    def second_moments(
        self,
        surrogates: Surrogates,
        skipped: Sequence[Sublayer],
        wanted: Sequence[Sublayer],
        spec: SurrogateSpec,
    ) -> dict[Sublayer, list[SecondMoments]]:
        """Return for each of `wanted` the second moments of each fold.

        Args:
            surrogates: of what is skipped.
            skipped: what is skipped; sublayers behind all of `wanted` are skipped as well.
            wanted: sublayers, skipped or not.
            spec: whose kind says whether the inputs are normalized.
        """
        sublayers = self.runtime.sublayers
        index = {s: i for i, s in enumerate(sublayers)}
        behind = sublayers[max(index[s] for s in wanted) + 1 :]
        skipping = SkipPlan.of(sublayers, (*skipped, *behind), surrogates=surrogates)
        full = SkipPlan.of(sublayers, behind)
        chosen = (skipping.digest, full.digest, tuple(map(str, wanted)), spec.kind)
        self.replicas.ranks.agree("what to fit", chosen)
        like = self.runtime.graphs.structure.width, self.runtime.device, spec.kind == "normalized"
        folds = range(max(self.folds) + 1)
        moments = {s: [SecondMoments.zeros(*like) for _ in folds] for s in wanted}

        def add(sample: int) -> None:
            ids = self.samples[sample]
            inputs, targets = (self._streams(ids, p) for p in (skipping, full))
            for s in wanted:
                of_fold = moments[s][self.folds[sample]]
                of_fold.add(inputs[index[s]], targets[index[s] + 1])

        self.replicas.share("second moments", [ids.shape[1] for ids in self.samples], add)
        sums = (t for of_folds in moments.values() for fold in of_folds for t in fold.tensors)
        self.replicas.add_up("second moments", list(sums))
        return moments

    @torch.no_grad()
    def _streams(self, ids: torch.Tensor, plan: SkipPlan) -> tuple[torch.Tensor, ...]:
        recorder = ResidualRecorder()
        cache = self.runtime.new_cache(ids.shape[1], plan=plan, instrument=recorder)
        self.runtime.step(ids, None, None, cache, 1)
        return recorder.streams


def _skipped(plan: SkipPlan) -> tuple[Sublayer, ...]:
    """Return what prompts do not run.

    Raises:
        ValueError: attention of theirs has windows: maps would be fitted to other streams.
    """
    if plan.windows.prefill:
        raise ValueError(
            "surrogates cannot be fitted for a plan with windows in prefill yet: fit them first, "
            "and give the windows to the fitted plan (plan.with_windows)"
        )
    return tuple(s for s in plan.sublayers if plan.action("prefill", s) is not Action.RUN)


def _read(
    model: Any, tokenizer: Tokenizer, longest: int, texts: Texts
) -> tuple[list[torch.Tensor], list[int]]:
    """Return the samples [1, T] on the model's device, and the fold of each."""
    pairs = _with_folds(texts)
    if not pairs:
        raise ValueError("no text was given to fit on; pass at least one")
    found = (_ids(model, tokenizer, text, longest) for _, text in pairs)
    return [ids.to(model.device) for ids in found], [fold for fold, _ in pairs]


def _ids(model: Any, tokenizer: Tokenizer, text: str | torch.Tensor, longest: int) -> torch.Tensor:
    if isinstance(text, torch.Tensor):
        return text[:, :longest]
    return tokenize(model, tokenizer, [text], longest)[0]


def _with_folds(texts: Texts) -> list[tuple[int, str | torch.Tensor]]:
    """Return each text with the fold that it is in: its kind's, or one of five in turn."""
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of texts, not one string")
    if not isinstance(texts, Mapping):
        return [(i % _FOLDS, text) for i, text in enumerate(texts)]
    if len(texts) == 1:
        return _with_folds(next(iter(texts.values())))
    return [(fold, text) for fold, group in enumerate(texts.values()) for text in group]
