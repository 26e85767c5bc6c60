"""What rounds take, measured: a plain step, and a block of drafts with its verification."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import TypeAlias

#: Who drafted, and how many tokens; `PLAIN` is a step with nothing to verify.
Round: TypeAlias = tuple[str, int]
PLAIN: Round = ("", 0)
_KEPT = 5  # of each kind of round: their median counts


class Times:
    """Times of rounds over all requests of a model, by rows and by length (to a power of two)."""

    def __init__(self) -> None:
        """Begin with nothing measured."""
        self._seconds: dict[tuple[int, int], dict[Round, deque[float]]] = {}
        self._ratios: dict[tuple[int, Round], float] = {}

    def add(self, rows: int, length: int, kind: Round, seconds: float) -> None:
        """Count a round in which nothing was set up."""
        here = self._seconds.setdefault((rows, length.bit_length()), {})
        here.setdefault(kind, deque(maxlen=_KEPT)).append(seconds)
        if PLAIN in here:
            plain = statistics.median(here[PLAIN])
            self._ratios[rows, kind] = statistics.median(here[kind]) / plain

    def plain(self, rows: int, length: int) -> float | None:
        """Return the seconds of a plain step with so many tokens stored; None before the first."""
        here = self._seconds.get((rows, length.bit_length()), {})
        return statistics.median(here[PLAIN]) if PLAIN in here else None

    def ratio(self, rows: int, length: int, kind: Round, slope: float) -> float:
        """Return what a round takes, in plain steps.

        Where it was never measured it is a plain step and as much more for each token as in the
        block of the same proposer whose length is nearest, or `slope`.
        """
        here: Mapping[Round, deque[float]] = self._seconds.get((rows, length.bit_length()), {})
        if kind in here and PLAIN in here:
            return statistics.median(here[kind]) / statistics.median(here[PLAIN])
        if (rows, kind) in self._ratios:
            return self._ratios[rows, kind]
        name, count = kind
        known = [k for r, (n, k) in self._ratios if r == rows and n == name]
        if known:
            near = min(known, key=lambda k: abs(k - count))
            slope = (self._ratios[rows, (name, near)] - 1) / near
        return 1 + slope * count
