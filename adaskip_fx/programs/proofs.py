"""What is known of captured graphs: that they give the model's logits, and for which inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from adaskip_passes import UnsupportedError
from adaskip_passes.tracing.capture import ShapeGuards

from ..capture.arguments import Forward
from ..capture.check_graph import check_graph, is_right_for_padding
from ..capture.phase_graph import CapturedPhase
from ..capture.rounding import allowed_by_rounding
from ..capture.state import State
from ..capture.states import States
from ..parallel.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..capture.reference import ReferenceRun


class Proofs:
    """Compares captured graphs of one model with what the model gives, each thing once."""

    def __init__(self, model: PreTrainedModel, states: States, ranks: Ranks) -> None:
        """Know nothing yet of the graphs of `model`, which `ranks` run together."""
        self._model = model
        self._ranks = ranks
        self._states = states
        self._padding: WeakKeyDictionary[CapturedPhase, bool] = WeakKeyDictionary()
        self._rounded: WeakSet[ReferenceRun] = WeakSet()
        self._guards: WeakKeyDictionary[CapturedPhase, tuple[int, ShapeGuards]] = (
            WeakKeyDictionary()
        )

    def check(self, captured: CapturedPhase, state: State, forward: Forward) -> None:
        """Refuse a graph that gives other logits than the model does.

        Args:
            captured: The graph.
            state: Of the model's Python.
            forward: The function that was traced.

        Raises:
            UnsupportedError: the logits are others.
        """
        self._ranks.together("the proof of a graph", lambda: self._check(captured, state, forward))

    def _check(self, captured: CapturedPhase, state: State, forward: Forward) -> None:
        if not state.has_own_reference or state.reference.device != captured.key.device:
            self._states.run_reference(state)
        try:
            check_graph(state.reference, captured, self._model, forward)
        except UnsupportedError:  # weights may have been changed since
            self._states.run_reference(state)
            try:
                check_graph(state.reference, captured, self._model, forward)
            except UnsupportedError:
                if not self._allow_rounding(state, forward):
                    raise
                check_graph(state.reference, captured, self._model, forward)

    def takes_padding(self, captured: CapturedPhase, forward: Forward) -> bool:
        """Return whether a graph for a static cache is right for padding; that is tried once."""
        if captured not in self._padding:
            state = self._states.current

            def right() -> bool:
                found = is_right_for_padding(state.reference, captured, self._model, forward)
                return self._ranks.every("a graph for padding", found)

            self._padding[captured] = right() or (self._allow_rounding(state, forward) and right())
        return self._padding[captured]

    def _allow_rounding(self, state: State, forward: Forward) -> bool:
        """Allow what another rounding does to the logits of a model; returns if that is more.

        The logits of some models hang on the last bit of each value.
        """
        if state.reference in self._rounded:
            return False
        allowed = allowed_by_rounding(state.reference, self._model, forward)
        more = self._ranks.every("another rounding", allowed > state.reference.tolerance)
        if more:
            state.reference = replace(state.reference, tolerance=allowed)
        self._rounded.add(state.reference)
        return more

    def hold(self, captured: CapturedPhase, arguments: dict[str, Any]) -> bool:
        """Return whether a graph's guards hold, of every rank's graph for its arguments."""
        holds = self.guards(captured).hold(arguments)
        return self._ranks.every("the guards of a graph", holds)

    def guards(self, captured: CapturedPhase) -> ShapeGuards:
        """Return the guards as of what is compiled now; made again when more has been since."""
        known = self._guards.get(captured)
        if known is None or known[0] != captured.compiler.compiled:
            known = self._guards[captured] = (captured.compiler.compiled, captured.guards())
        return known[1]
