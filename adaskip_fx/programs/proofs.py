"""What is known of captured graphs: that they give the model's logits, and for which inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from adaskip_passes import UnsupportedError
from adaskip_passes.tracing.capture import ShapeGuards

from ..capture.arguments import Forward
from ..capture.check_graph import check_graph, is_right_for_padding
from ..capture.phase_graph import CapturedPhase
from ..capture.state import State
from ..capture.states import States

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Proofs:
    """Compares captured graphs of one model with what the model gives, each thing once."""

    def __init__(self, model: PreTrainedModel, states: States) -> None:
        """Know nothing yet of the graphs of `model`."""
        self._model = model
        self._states = states
        self._padding: WeakKeyDictionary[CapturedPhase, bool] = WeakKeyDictionary()
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
        if not state.has_own_reference or state.reference.device != captured.key.device:
            self._states.run_reference(state)
        try:
            check_graph(state.reference, captured, self._model, forward)
        except UnsupportedError:  # weights may have been changed since
            self._states.run_reference(state)
            check_graph(state.reference, captured, self._model, forward)

    def takes_padding(self, captured: CapturedPhase, forward: Forward) -> bool:
        """Return whether a graph for a static cache is right for padding; that is tried once."""
        if captured not in self._padding:
            self._padding[captured] = is_right_for_padding(
                self._states.current.reference, captured, self._model, forward
            )
        return self._padding[captured]

    def guards(self, captured: CapturedPhase) -> ShapeGuards:
        """Return the guards as of what is compiled now; made again when more has been since."""
        known = self._guards.get(captured)
        if known is None or known[0] != captured.compiler.compiled:
            known = self._guards[captured] = (captured.compiler.compiled, captured.guards())
        return known[1]
