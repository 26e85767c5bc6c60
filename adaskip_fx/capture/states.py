"""The states of its Python that a compiled model was in, and which one it is in now.

A captured graph is right for the hooks, adapters, attributes, config values and functions that
were traced. Two module trees are watched: the compiled model's own, which graphs are captured of,
and the original's, whose tensors it shares.

- Another state of the compiled model's tree is another `State`, with graphs of its own; a few are
  kept, so that going back costs nothing.
- A tensor that is replaced on the original, under its name, is taken over, and so is what is done
  to adapters there (`adapters`); any other change there is refused until it is undone, or done to
  the compiled model as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from adaskip_passes import UnsupportedError
from adaskip_passes._torch import one_at_a_time
from adaskip_passes.tracing.python_state import PythonState

from ..utils.transformers_internals import OFFSETS, only_records
from . import rotary
from .original import Original
from .rotary_state import RotaryState
from .same_objects import same_tensors
from .state import ChangedError, Since, State
from .traced_part import decoder_name, traced_forward

if TYPE_CHECKING:
    from .reference import ReferenceRun

_MOST_STATES = 8
#: Attributes of a model that say nothing about its forward: ours, and what is copied for a request.
_LEFT_OUT = ("_adaskip", "generation_config")
#: What models write on themselves from call to call: of images what stands for positions that are
#: not given, and those of a captured step are; of classifiers which loss the labels were for.
_OF_A_REQUEST = frozenset({OFFSETS, "problem_type"})
#: What a compiled model reads of its config besides what is traced.
_READ_BY_US = frozenset(
    {
        *("use_cache", "return_dict", "use_return_dict", "output_hidden_states"),
        *("output_attentions", "output_router_logits"),
    }
)


class States:
    """The states that a compiled model was in at some look, the last one last.

    Attributes:
        model: the compiled model.
        original: the model that it was made of.
        first: the state in which they are the same.
    """

    def __init__(
        self, model: PreTrainedModel, original: PreTrainedModel, reference: ReferenceRun
    ) -> None:
        self.model = model
        self.original = original
        self._library = (*PreTrainedModel.__mro__, *_generated(type(model)))
        self.first = State(reference)
        self.first.watch(self._watched(model))
        self._followed = Original(original, model, self._watched, self.first, _OF_A_REQUEST)
        self._rotary = RotaryState(original, model)
        self._all = [self.first]

    @property
    def current(self) -> State:
        """The state at the last look."""
        return self._all[-1]

    @property
    def known(self) -> list[State]:
        """All states that are kept."""
        return list(self._all)

    def look(self) -> State:
        """Return the state that the model is in now.

        Half a millisecond for a model of 32 layers if nothing has changed. In a state that was not
        met before, the model is run on a few tokens.

        Raises:
            ChangedError: the original was changed and the compiled model was not, or rotary
                embeddings of either that depend on the length were.
            UnsupportedError: the model does not run as it is now.
        """
        self._rotary.check()
        current = self.current
        if self._followed.is_unchanged(current) and current.holds():
            return current
        with one_at_a_time:  # modules are marked while they are traced
            self._followed.hand_over_tensors()
            self._followed.follow_adapters()
            agreed = self._followed.check(self._names())
            state = self._find()
            self._followed.agree(agreed, state)
            return state

    def begin(self) -> Since:
        """Return the state that a request begins with now; errors as of `look`."""
        return Since.of(self.look(), self._followed.merges)

    def require(self, since: Since) -> None:
        """Refuse to go on if anything has changed since a request began.

        Raises:
            ChangedError: something has.
        """
        state = self.look()
        if state is not since.state:
            changed = self._changes(since.state)
        elif not same_tensors(Since.of(state).tensors, since.tensors):
            changed = "a parameter or buffer was replaced"
        else:
            return
        raise ChangedError(
            f"{type(self.model).__name__} was changed since this request began ({changed}), and "
            "what is in its cache was computed before; begin a new request"
        )

    def _changes(self, state: State) -> str:
        changes = state.changes()
        return ", ".join(changes[:3]) if changes else "and changed back"

    def _watched(self, model: nn.Module) -> PythonState:
        apart = rotary.by_length(model)  # whose frequencies change from call to call
        return PythonState(model, _LEFT_OUT, self._library, apart, only_records)

    def _names(self) -> frozenset[str]:
        """Return every attribute and key that anything captured has read."""
        read = _READ_BY_US.union(*(r.names for state in self._all for r in state.reads))
        return read - _OF_A_REQUEST

    def _find(self) -> State:
        for state in reversed(self._all):
            if state.holds():
                if state is not self.current:
                    self.current.tensors = None
                    self._all.remove(state)
                    self._all.append(state)
                return state
        current = self.current
        if current.reads and current.holds_but_for(self._names()):
            current.watch(self._watched(self.model))
            return current
        state = self._new(current)
        current.tensors = None
        self._all.append(state)
        del self._all[:-_MOST_STATES]
        return state

    def _new(self, before: State) -> State:
        state = State(before.reference, has_own_reference=False)
        if not before.is_other_code_alone():
            self.run_reference(state, before)
        state.watch(self._watched(self.model))
        return state

    def run_reference(self, state: State, before: State | None = None) -> None:
        """Run the model on a few tokens, in the state it is in, for the reference of that state.

        Args:
            state: gets the reference.
            before: the state that the model was in before, for the message.

        Raises:
            UnsupportedError: it does not run, as it was changed since it was in the state `before`.
        """
        try:
            state.reference = state.reference.rerun(
                self.model, traced_forward(self.original, decoder_name(self.original))
            )
            state.has_own_reference = True
        except UnsupportedError as error:
            if before is None:
                raise
            raise UnsupportedError(
                f"{type(self.model).__name__} was changed since it was compiled "
                f"({self._changes(before)}), and does not run as it is now: {error}"
            ) from error


def _generated(kind: type) -> tuple[type, ...]:
    """Return the classes that make a compiled model's class of its model's."""
    return tuple(c for c in kind.__mro__ if c is kind or c.__module__.startswith("adaskip_fx."))
