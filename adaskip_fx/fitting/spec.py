"""What kind of surrogate to fit, and how its rank and its ridge are chosen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import SHAPES, Surrogate, SurrogateKind

from .least_squares import best_ridge, smallest_rank, solve
from .rank_bound import LatencyBound
from .second_moments import SecondMoments

_ALONE = 1e-2  # the ridge where there is nothing to choose it by


@dataclass(frozen=True)
class SurrogateSpec:
    """What kind of surrogate to fit.

    kind: of the ladder.
    rank: of low-rank maps; None: for each sublayer the smallest power of two that leaves at most a
        hundredth more of unseen texts than the linear map, which is taken itself where its H^2
        weights are no more than the 2 H r.
    ridge: in units of the mean square of the inputs; None: what leaves the least of unseen texts.
    bound: no rank is chosen above the largest that fits this share of a sublayer's time, and a
        linear map only where it fits.

    Texts are unseen in turn: each kind of text by a fit to the other kinds, or, where there is but
    one kind, each fifth by a fit to the others.

    ValueError for an unknown kind, a rank below 1 or of another kind, or a bound of another kind or
    of a rank that is given.
    """

    kind: SurrogateKind = "linear"
    rank: int | None = None
    ridge: float | None = None
    bound: LatencyBound | None = None

    def __post_init__(self) -> None:
        if self.kind not in SHAPES:
            raise ValueError(f"unknown surrogate {self.kind!r}: use one of {', '.join(SHAPES)}")
        if self.rank is not None and (self.kind != "low_rank" or self.rank < 1):
            raise ValueError(f"rank must be at least 1, and of low_rank, got {self.rank!r}")
        if self.bound is not None and (self.kind != "low_rank" or self.rank is not None):
            given = self.kind if self.rank is None else f"rank {self.rank}"
            raise ValueError(f"a latency bound is for a low_rank without a rank, got {given}")

    def most(self, sublayer: Sublayer) -> int | None:
        """The largest rank that the bound allows for `sublayer`; None where any is."""
        return self.bound.rank(sublayer) if self.bound is not None else None

    def fit(self, folds: Sequence[SecondMoments], most: int | None = None) -> Surrogate:
        """The surrogate of this rung; folds choose, and then all of them count.

        most: the largest rank to choose; None for any, and a linear map.

        ValueError when no token counts.
        """
        folds = [fold for fold in folds if fold.tokens]
        if not folds:
            raise ValueError(
                "there is nothing to fit on: the stream of every token is zero or not finite. Use "
                "other texts, or load the model in a wider dtype if it overflows"
            )
        total = functools.reduce(SecondMoments.plus, folds)
        if self.kind in ("scale", "diagonal"):
            return solve(total, self.kind)
        if self.kind in ("linear", "normalized"):
            return solve(total, self.kind, ridge=self._ridge(folds, self.kind))
        rank, ridge = self.rank, self.ridge
        if rank is None:
            rank, best = _rank(folds, most)
            ridge = best if ridge is None else ridge
        if 2 * rank >= total.hidden:
            return solve(total, "linear", ridge=self._ridge(folds, "linear"))
        return solve(
            total,
            "low_rank",
            rank,
            self._ridge(folds, "low_rank", rank) if ridge is None else ridge,
        )

    def _ridge(self, folds: Sequence[SecondMoments], kind: SurrogateKind, rank: int = 0) -> float:
        if self.ridge is not None:
            return self.ridge
        return best_ridge(folds, kind, rank) if len(folds) > 1 else _ALONE


def _rank(folds: Sequence[SecondMoments], most: int | None) -> tuple[int, float]:
    """The rank that unseen texts ask for, or `most` where that is smaller, and its ridge."""
    hidden = folds[0].hidden
    most = hidden if most is None else most
    if len(folds) == 1:
        return min(max(1, hidden // 8), most), _ALONE
    powers = (2**i for i in range(hidden.bit_length() - 1))
    rank, ridge = smallest_rank(folds, [power for power in powers if power < most])
    return (rank, ridge) if rank <= most else (most, best_ridge(folds, "low_rank", most))
