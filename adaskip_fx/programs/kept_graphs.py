"""The captured graphs that are kept, as far as the memory budget goes.

A program holds its graph, so that a graph goes no sooner than its programs do.
"""

from __future__ import annotations

from contextlib import suppress

from ..capture.phase_graph import CapturedPhase
from ..capture.state import State
from ..capture.states import States
from ..utils.memory_budget import MemoryBudget


class KeptGraphs:
    """The captured graphs of one model.

    Attributes:
        first: the first of all, which says what the model is made of, and is never let go.
        pieces, seconds: what those that were let go had compiled, and how long that took.
    """

    def __init__(self, states: States, budget: MemoryBudget) -> None:
        """Keep what is captured in any of `states`, within `budget`."""
        self.first: CapturedPhase | None = None
        self.pieces = 0
        self.seconds = 0.0
        self._states = states
        self._budget = budget

    def all(self) -> list[CapturedPhase]:
        """Return what is kept: the first, and what was captured in the states the model was in."""
        first = [self.first] if self.first is not None else []
        groups = [g for s in self._states.known for g in list(s.captures.values())]
        return list(dict.fromkeys([*first, *(c for group in groups for c in list(group))]))

    def keep(self, captured: CapturedPhase, state: State) -> None:
        """Keep what was captured in a state."""
        state.add(captured)
        if self.first is None:
            self.first = captured
        never = captured is self.first
        self._budget.keep(captured, "graphs", None if never else self._let_go)

    def _let_go(self, captured: CapturedPhase) -> None:
        for state in self._states.known:
            with suppress(ValueError):  # (one operation each: others may read and add meanwhile)
                state.captures.get(captured.key, []).remove(captured)
        self.pieces += captured.compiler.compiled
        self.seconds += captured.compiler.seconds
