"""How many captured graphs are kept: what no program needs goes first, by when it was needed.

Linked programs are bounded by ``max_variants``. A captured graph takes seconds to be made again, so
more of them are kept. A recorded CUDA graph is kept no longer than its program and the buffers
that it works on, of which one set is kept for the next request.
"""

from __future__ import annotations

from collections.abc import Collection
from weakref import WeakKeyDictionary

from ..capture.phase_graph import CapturedPhase
from ..capture.states import States

#: Captured graphs of a model that are kept, or as many as there are programs where these are more.
MOST_GRAPHS = 64


class KeptGraphs:
    """The captured graphs of one model.

    Attributes:
        limit: how many are kept, the first one of all not counted.
        dropped: how many were dropped.
        pieces, seconds: what those had compiled, and how long that took.
    """

    def __init__(self, states: States, limit: int) -> None:
        """Keep as many as `limit` of what is captured in any of `states`."""
        self.limit = limit
        self.dropped = self.pieces = 0
        self.seconds = 0.0
        self._states = states
        self._idle_since: WeakKeyDictionary[CapturedPhase, int] = WeakKeyDictionary()
        self._count = 0

    def all(self) -> list[CapturedPhase]:
        """Return what is kept in the states that the model was in."""
        states = self._states.known
        return [c for s in states for group in s.captures.values() for c in group]

    def lost_program(self, captured: CapturedPhase) -> None:
        """Say that a program of a graph was dropped just now."""
        self._count += 1
        self._idle_since[captured] = self._count

    def trim(self, needed: Collection[CapturedPhase]) -> None:
        """Drop graphs that are not `needed` while there are more than the limit."""
        idle = sorted(set(self.all()) - set(needed), key=lambda c: self._idle_since.get(c, 0))
        for captured in idle[: max(0, len(self.all()) - self.limit)]:
            self._drop(captured)

    def _drop(self, captured: CapturedPhase) -> None:
        for state in self._states.known:
            group = state.captures.get(captured.key, [])
            rest = [c for c in group if c is not captured]  # others may be reading the old list
            if len(rest) < len(group):
                state.captures[captured.key] = rest
        self.dropped += 1
        self.pieces += captured.compiler.compiled
        self.seconds += captured.compiler.seconds
