"""What rounds take, measured: a plain step, and a block of drafts with its verification."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Mapping
from typing import TypeAlias

#: Who drafted, and how many tokens; `PLAIN` is a step with nothing to verify.
Round: TypeAlias = tuple[str, int]
PLAIN: Round = ("", 0)
_KEPT = 5  # of each kind of round: their median counts
_SURE = 3  # rounds after which anything is believed
_ODD = 4.0  # times what was supposed, which is not believed before


class Times:
    """Times of rounds over all requests of a model, by rows and by length (to a power of two)."""

    def __init__(self) -> None:
        """Begin with nothing measured."""
        self._seconds: dict[tuple[int, int], dict[Round, deque[float]]] = {}
        self._medians: dict[tuple[int, int], dict[Round, float]] = {}  # of these
        self._ratios: dict[tuple[int, Round], float] = {}
        self._seen: Counter[tuple[int, Round]] = Counter()

    def add(self, rows: int, length: int, kind: Round, seconds: float) -> None:
        """Count a round in which nothing was set up."""
        where = rows, length.bit_length()
        seen = self._seconds.setdefault(where, {}).setdefault(kind, deque(maxlen=_KEPT))
        seen.append(seconds)
        self._seen[rows, kind] += 1
        medians = self._medians.setdefault(where, {})
        medians[kind] = statistics.median(seen)
        if PLAIN in medians:
            self._ratios[rows, kind] = medians[kind] / medians[PLAIN]

    def plain(self, rows: int, length: int) -> float | None:
        """Return the seconds of a plain step with so many tokens stored; None before the first."""
        return self._medians.get((rows, length.bit_length()), {}).get(PLAIN)

    def ratio(self, rows: int, length: int, kind: Round, slope: float) -> float:
        """Return what a round takes, in plain steps.

        Where it was never measured it is a plain step and `slope` for each token, or what the block
        of the same proposer takes whose length is nearest, and for each further token as much as
        for those, but no more than `slope`: a block may be dear for being one. Nor is it believed
        once or twice that one takes several times as long: a host may have been busy for a moment.
        """
        here: Mapping[Round, float] = self._medians.get((rows, length.bit_length()), {})
        measured = self._ratios.get((rows, kind))
        if kind in here and PLAIN in here:
            measured = here[kind] / here[PLAIN]
        if measured is not None and self._believes(rows, kind, measured, slope):
            return measured
        return self._supposed(rows, kind, slope)

    def _supposed(self, rows: int, kind: Round, slope: float) -> float:
        """Return what a round would take by other ones."""
        name, count = kind
        known = {k: took for (r, (n, k)), took in self._ratios.items() if r == rows and n == name}
        known = {k: took for k, took in known.items() if k != count}
        sure = [k for k, took in known.items() if self._believes(rows, (name, k), took, slope)]
        if not sure:
            return 1 + slope * count
        near = min(sure, key=lambda k: abs(k - count))
        slope = min(slope, (known[near] - 1) / near)
        return max(1.0, known[near] + slope * (count - near))

    def _believes(self, rows: int, kind: Round, measured: float, slope: float) -> bool:
        odd = measured > _ODD * (1 + slope * kind[1])
        return not odd or self._seen[rows, kind] >= _SURE
