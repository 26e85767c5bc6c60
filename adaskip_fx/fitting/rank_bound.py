"""A bound of a low-rank surrogate's rank: a share of the measured time of its sublayer.

The seconds of ranks and sublayers come from a latency table that was measured with ranks. A rank is
never worse than a smaller one at explaining what it is fitted to, so the largest that fits is the
bound. It is never faster either: where measured times say so, that is noise, and their median
counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median_high
from typing import Literal, get_args

from adaskip_fx.latency.table import LatencyTable
from adaskip_fx.latency.terms import TableError, low_rank_term, rank_of
from adaskip_fx.plans.skip_plan import Phase
from adaskip_fx.plans.sublayer import Sublayer


@dataclass(frozen=True)
class LatencyBound:
    """A low-rank surrogate takes at most a share of the measured time of its sublayer.

    Attributes:
        table: what sublayers and ranks cost: `measure(..., ranks=True)`, or
            `adaskip-fx measure --ranks`.
        context: tokens of a prompt, and tokens stored at a decode step, at which costs are
            compared.
        share: of the time of one sublayer.
        phase: in which it holds: `"both"`, each for itself, or one of them.

    Raises:
        ValueError: a share that is not in (0, 1], an unknown phase, or a class of sublayers of
            whose time even the smallest rank takes more.
        TableError: the table has no ranks, or does not cover `context`.
    """

    table: LatencyTable
    context: int
    share: float = 0.1
    phase: Phase | Literal["both"] = "both"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"share must be above 0 and at most 1, of a sublayer's time; got {self.share!r}"
            )
        if self.phase not in ("both", *get_args(Phase)):
            raise ValueError(f"phase must be 'both', 'prefill' or 'decode', got {self.phase!r}")
        _ = self._largest  # refuses before anything is fitted

    def rank(self, sublayer: Sublayer) -> int | None:
        """Return the largest rank that fits for `sublayer`; None where even a linear map does.

        It is None as well where the sublayer cannot be skipped, since its cost is not known.

        Raises:
            TableError: the table is of a model without it.
        """
        if sublayer not in self.table.sublayers:
            raise TableError(f"the table has no {sublayer}: it is of another model")
        name = self.table.classes[self.table.sublayers.index(sublayer)]
        return self._largest[name] if name else None

    @cached_property
    def _largest(self) -> Mapping[str, int | None]:
        return {name: self._largest_of(name) for name in sorted({*self.table.classes} - {""})}

    def _largest_of(self, name: str) -> int | None:
        fitting = [size for size in self._sizes if self._fits(size, name)]
        if not fitting:
            raise ValueError(self._too_slow(name))
        return None if math.inf in fitting else int(max(fitting))

    @cached_property
    def _sizes(self) -> Mapping[float, Mapping[Phase, float]]:
        """Seconds by rank and phase; the rank of the linear map is infinity."""
        terms = self.table.at(self._phases[0], self.context)
        ranks = sorted(rank for rank in map(rank_of, terms) if rank is not None)
        if not ranks:
            raise TableError(
                "the table has no low-rank surrogates; measure again (adaskip-fx measure --ranks)"
            )
        found: dict[float, dict[Phase, float]] = {rank: {} for rank in ranks}
        if "linear" in terms:
            found[math.inf] = {p: self._cost("linear", p) for p in self._phases}
        for phase in self._phases:
            seconds = not_decreasing([self._cost(low_rank_term(rank), phase) for rank in ranks])
            for rank, of_rank in zip(ranks, seconds, strict=True):
                found[rank][phase] = of_rank
        return found

    @property
    def _phases(self) -> tuple[Phase, ...]:
        return get_args(Phase) if self.phase == "both" else (self.phase,)

    def _cost(self, term: str, phase: Phase) -> float:
        return self.table.cost(term, phase, self.context)

    def _fits(self, size: float, name: str) -> bool:
        return all(self._share(size, name, phase) <= self.share for phase in self._phases)

    def _share(self, size: float, name: str, phase: Phase) -> float:
        seconds = self._cost(name, phase)
        return self._sizes[size][phase] / seconds if seconds else math.inf

    def _too_slow(self, name: str) -> str:
        smallest = min(self._sizes)
        share, phase = max((self._share(smallest, name, phase), phase) for phase in self._phases)
        seconds, whole = self._sizes[smallest][phase], self._cost(name, phase)
        return (
            f"no low-rank surrogate takes at most {self.share:.3g} of the time of {name} in "
            f"{phase} at {self.context:,} tokens: rank {smallest}, the smallest measured, takes "
            f"{1000 * seconds:.3g} of {1000 * whole:.3g} ms, a share of {share:.3g}; allow a "
            "larger share, or use a scale"
        )


def not_decreasing(values: Sequence[float]) -> list[float]:
    """Return the nearest values, in sum of distances, that never decrease.

    Neighbours that decrease are replaced by their median, of an even number by the higher one
    (isotonic regression by pooling adjacent violators): a single outlier does not decide.
    """
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and median_high(pools[-2]) > median_high(pools[-1]):
            last = pools.pop()
            pools[-1].extend(last)
    return [median_high(pool) for pool in pools for _ in pool]
