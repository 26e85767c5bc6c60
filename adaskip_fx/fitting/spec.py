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

_DEFAULT_RIDGE = 1e-2  # where there is one fold, so that nothing chooses it


@dataclass(frozen=True)
class SurrogateSpec:
    """What kind of surrogate to fit.

    Rank and ridge are chosen by cross-validation: each kind of text is judged by a fit to the other
    kinds, or, where there is one kind, each fifth by a fit to the others.

    Attributes:
        kind: of the surrogate.
        rank: of low-rank maps; None: for each sublayer the smallest power of two whose unexplained
            variance is at most a hundredth above that of the linear map, which is taken itself
            where its H^2 weights are no more than the 2 H r.
        ridge: in units of the mean square of the inputs; None: the best one.
        bound: no rank is chosen above the largest that fits this share of a sublayer's time, and a
            linear map only where it fits.

    Raises:
        ValueError: an unknown kind; a rank below 1 or of another kind than low_rank; a bound of
            another kind, or beside a rank.
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
            got = self.kind if self.rank is None else f"rank {self.rank}"
            raise ValueError(f"a latency bound is for a low_rank without a rank, got {got}")

    def largest_rank(self, sublayer: Sublayer) -> int | None:
        """Return the largest rank that the bound allows for `sublayer`; None for no limit."""
        return self.bound.rank(sublayer) if self.bound is not None else None

    def fit(self, folds: Sequence[SecondMoments], largest_rank: int | None = None) -> Surrogate:
        """Return the surrogate; folds choose rank and ridge, and then all of them count.

        Args:
            folds: second moments of each fold.
            largest_rank: the largest rank to choose; None for any, and a linear map.

        Raises:
            ValueError: no token counts, or a scale would not be positive.
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
            rank, best = _best_rank(folds, largest_rank)
            ridge = best if ridge is None else ridge
        if 2 * rank >= total.hidden:
            return solve(total, "linear", ridge=self._ridge(folds, "linear"))
        if ridge is None:
            ridge = self._ridge(folds, "low_rank", rank)
        return solve(total, "low_rank", rank, ridge)

    def _ridge(self, folds: Sequence[SecondMoments], kind: SurrogateKind, rank: int = 0) -> float:
        if self.ridge is not None:
            return self.ridge
        return best_ridge(folds, kind, rank) if len(folds) > 1 else _DEFAULT_RIDGE


def _best_rank(folds: Sequence[SecondMoments], largest: int | None) -> tuple[int, float]:
    """Return the rank that cross-validation chooses, or `largest` if smaller, and its ridge."""
    hidden = folds[0].hidden
    most = hidden if largest is None else largest
    if len(folds) == 1:
        return min(max(1, hidden // 8), most), _DEFAULT_RIDGE
    powers = (2**i for i in range(hidden.bit_length() - 1))
    rank, ridge = smallest_rank(folds, [power for power in powers if power < most])
    return (rank, ridge) if rank <= most else (most, best_ridge(folds, "low_rank", most))
