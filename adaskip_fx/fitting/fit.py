"""Fit stand-ins in the order of the plan, towards the full model's stream.

For each skipped sublayer, first to last, texts run through two programs: one that skips, with what
was fitted for the sublayers before it, gives the stream x that this one's stand-in will see; the
full model gives the stream y that there should be after it. So later stand-ins see compensated
inputs, and make good what earlier ones left. What lies behind the sublayer is left out of both
programs. A plan is linked in milliseconds, so none of this compiles anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaskip_fx.api import build
from adaskip_fx.calibration import tokenize
from adaskip_fx.compensation import Compensation
from adaskip_fx.plan import Action, SkipPlan
from adaskip_fx.runtime import Runtime
from adaskip_fx.shell import check_model
from adaskip_fx.stand_in import SHAPES, StandIn, StandInKind
from adaskip_fx.sublayer import Sublayer
from adaskip_fx.watched import Streams, watching

from .moments import Moments
from .solve import best_ridge, smallest_rank, solve

_HELD_OUT = 5  # every fifth text chooses ridge and rank; the others are what it chooses for
_SLACK = 0.01  # of the target: what a smaller rank may leave more than the whole map


@dataclass(frozen=True)
class Rung:
    """What kind of stand-in to fit.

    kind: of the ladder.
    rank: of low-rank maps; None: for each sublayer the smallest power of two that leaves at most a
        hundredth more of held-out texts than the whole linear map, which is taken where its H^2
        weights are no more than the 2 H r.
    ridge: in units of the mean square of the inputs; None: what is best on held-out texts.

    ValueError for an unknown kind, or a rank below 1 or of another kind.
    """

    kind: StandInKind = "linear"
    rank: int | None = None
    ridge: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in SHAPES:
            raise ValueError(f"unknown stand-in {self.kind!r}: use one of {', '.join(SHAPES)}")
        if self.rank is not None and (self.kind != "low_rank" or self.rank < 1):
            raise ValueError(f"rank must be at least 1, and of low_rank, got {self.rank!r}")

    def fit(self, fitted: Moments, held_out: Moments) -> StandIn:
        """The stand-in of this rung; held-out tokens choose, then all count."""
        both = fitted.plus(held_out)
        if self.kind in ("scale", "diagonal"):
            return solve(both, self.kind)
        ridge, left = (self.ridge, None) if self.ridge is not None else _ridge(fitted, held_out)
        if self.kind == "linear":
            return solve(both, "linear", ridge=ridge)
        rank = self.rank
        if rank is None:
            rank = _rank(fitted, held_out, ridge, left)
        if 2 * rank >= both.hidden:
            return solve(both, "linear", ridge=ridge)
        return solve(both, "low_rank", rank, ridge)


def _ridge(fitted: Moments, held_out: Moments) -> tuple[float, float | None]:
    return best_ridge(fitted, held_out) if held_out.tokens else (1e-4, None)


def _rank(fitted: Moments, held_out: Moments, ridge: float, left: float | None) -> int:
    if not held_out.tokens:
        return max(1, fitted.hidden // 8)
    whole = left if left is not None else best_ridge(fitted, held_out, (ridge,))[1]
    ranks = [2**i for i in range(fitted.hidden.bit_length())]
    return smallest_rank(fitted, held_out, ridge, ranks, whole + _SLACK)


class Fitter:
    """A model and calibration texts, to fit stand-ins for one plan after the other.

    Args:
        model: a transformers decoder in evaluation mode; it is not changed.
        tokenizer: the model's.
        texts: as of :func:`adaskip_fx.calibrate`; every fifth is held out.
        max_length: tokens of a text at most.
        backend: inner torch.compile backend.
        together: sublayers whose moments are taken in one pass, where they do not see each other.

    Attributes:
        runtime: of the compiled model that it runs.
        samples: token ids int64 [1, T].
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        texts: Iterable[str],
        *,
        max_length: int = 2048,
        backend: str = "eager",
        together: int = 16,
    ) -> None:
        check_model(model)
        self.samples = [s.to(model.device) for s in tokenize(model, tokenizer, texts, max_length)]
        self.runtime: Runtime = build(model, None, backend=backend).adaskip
        self.together = together

    def fit(
        self,
        plan: SkipPlan,
        rung: Rung | Mapping[Sublayer, Rung] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SkipPlan:
        """`plan` with stand-ins for all that prefill does not run, fitted in its order.

        Args:
            plan: which; what stands in there already for other sublayers is kept.
            rung: what kind, for all or for each; linear maps if None.
            progress: called with (sublayers done, sublayers in all).
        """
        left_out = [s for s in plan.sublayers if plan.action("prefill", s) is not Action.RUN]
        done: dict[Sublayer, StandIn] = {}
        for number, sublayer in enumerate(left_out):
            if progress is not None:
                progress(number, len(left_out))
            moments = self._moments(Compensation(done), tuple(done), [sublayer])[sublayer]
            kind = rung.get(sublayer, Rung()) if isinstance(rung, Mapping) else rung or Rung()
            done[sublayer] = kind.fit(*moments)
        if progress is not None:
            progress(len(left_out), len(left_out))
        return plan.with_compensation(plan.compensation.merged(Compensation(done)))

    def beside(
        self, plan: SkipPlan, rung: Rung | None = None, kinds: Sequence[str] = ("ffn",)
    ) -> Compensation:
        """A stand-in for every sublayer that still runs, as if it alone were skipped besides.

        They do not see each other: one pass over the texts serves several. For FFN sublayers that a
        request may add while it decodes, and for a search that tries one after the other.

        Args:
            plan: with its stand-ins.
            rung: what kind; linear maps if None.
            kinds: of the sublayers.
        """
        left_out = tuple(s for s in plan.sublayers if plan.action("prefill", s) is not Action.RUN)
        running = [s for s in plan.sublayers if s not in left_out and s.kind in kinds]
        fitted: dict[Sublayer, StandIn] = {}
        for start in range(0, len(running), self.together):
            group = running[start : start + self.together]
            for sublayer, moments in self._moments(plan.compensation, left_out, group).items():
                fitted[sublayer] = (rung or Rung()).fit(*moments)
        return Compensation(fitted)

    def _moments(
        self, compensation: Compensation, left_out: Sequence[Sublayer], wanted: Sequence[Sublayer]
    ) -> dict[Sublayer, tuple[Moments, Moments]]:
        """For each of `wanted` the moments of fitted and of held-out texts."""
        sublayers = self.runtime.sublayers
        place = {s: i for i, s in enumerate(sublayers)}
        behind = sublayers[max(map(place.__getitem__, wanted)) + 1 :]
        skipping = SkipPlan.of(sublayers, (*left_out, *behind), compensation=compensation)
        full = SkipPlan.of(sublayers, behind)
        found: dict[Sublayer, tuple[Moments, Moments]] = {}
        with watching(self.runtime) as watched:
            for number, ids in enumerate(self.samples):
                seen, wished = (self._streams(ids, p, watched) for p in (skipping, full))
                held = number % _HELD_OUT == _HELD_OUT - 1
                for s in wanted:
                    if s not in found:
                        hidden = seen[0].shape[-1]
                        found[s] = tuple(  # type: ignore[assignment]  # two
                            Moments.zeros(hidden, seen[0].device) for _ in range(2)
                        )
                    found[s][held].add(seen[place[s]], wished[place[s] + 1])
        return found

    @torch.no_grad()
    def _streams(
        self, ids: torch.Tensor, plan: SkipPlan, watched: Callable[[], Streams]
    ) -> Streams:
        cache = self.runtime.new_cache(capacity=ids.shape[1], plan=plan)
        self.runtime.step(ids, None, None, cache, 1)
        return watched()


def fit(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    plan: SkipPlan,
    *,
    kind: StandInKind = "linear",
    rank: int | None = None,
    max_length: int = 2048,
    backend: str = "eager",
    progress: Callable[[int, int], None] | None = None,
) -> SkipPlan:
    """`plan` with a stand-in for each sublayer that prefill skips, fitted on texts.

    Linear maps from the stream before a sublayer to what the full model's stream is after it, each
    token weighted by 1 / |x|^2, in float64 from accumulated moments, whose size does not depend on
    how many texts there are (least squares as in NBL, arXiv 2505.21077, but towards the full
    model's stream and one after the other). FFN sublayers that decoding may add get a scale,
    fitted likewise.

    Args:
        model: a transformers decoder in evaluation mode; it is not changed.
        tokenizer: the model's.
        texts: what the model will be used on, or close to it; five or more, so that some can be
            held out.
        plan: which sublayers are skipped.
        kind: ``"linear"``, ``"low_rank"``, ``"diagonal"`` or ``"scale"``.
        rank: of low-rank maps; chosen on held-out texts if None (see :class:`Rung`).
        max_length: tokens of a text at most.
        backend: inner torch.compile backend; ``"eager"`` needs no compilation.
        progress: called with (sublayers done, sublayers in all).

    Raises:
        ValueError: texts or `max_length` that cannot be used, an unknown kind.
        RefusedError: the model's sublayers cannot be captured or proven.
    """
    rung = Rung(kind, rank)
    fitter = Fitter(model, tokenizer, texts, max_length=max_length, backend=backend)
    fitted = fitter.fit(plan, rung, progress)
    extras = fitter.beside(fitted, Rung("scale"))
    return fitted.with_compensation(fitted.compensation.merged(extras))
