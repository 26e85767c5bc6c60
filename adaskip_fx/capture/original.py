"""The user's model, whose tensors a compiled model shares: what changes there is followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from adaskip_passes.tracing.python_state import Change, PythonState

from ..parallel.shards import followed
from ..utils.transformers_internals import COPIED_APART
from .adapters import FollowedAdapters
from .same_objects import alike, equal, same_tensors
from .state import ChangedError, State
from .traced_part import decoder_name, decoder_path

#: Attributes that each of the two models has for itself, whatever the other one does.
_OWN = frozenset({"training", "gradient_checkpointing", *COPIED_APART})


class Original:
    """The user's model, and whether it is still what the compiled model was made of.

    A tensor that is replaced there under its name is taken over, and what is done to adapters is
    done here as well; any other change is refused until it is undone, or made in the compiled model
    as well.
    """

    def __init__(
        self,
        original: nn.Module,
        compiled: nn.Module,
        watched: Callable[[nn.Module], PythonState],
        first: State,
        of_a_request: frozenset[str],
    ) -> None:
        """Take what is there now for what the compiled model was made of.

        Args:
            original: the user's model.
            compiled: the compiled model, which shares its tensors.
            watched: gives what a module tree holds now.
            first: the state of the compiled model in which both are the same.
            of_a_request: attributes that a model has for a request, from call to call.
        """
        self._model = original
        self._compiled = compiled
        self._watched = watched
        self._first = first
        self._inside = decoder_name(original) or ".".join(decoder_path(original))
        self._request = of_a_request
        self._python = watched(original)
        self._shared = self._python.tensors()
        self._agreed: tuple[PythonState, State] | None = None  # of changes that both models have
        self._adapters = FollowedAdapters(original, compiled)
        self._followed = False  # whether adapters were, since what is watched was found

    def is_unchanged(self, current: State) -> bool:
        """Return whether it is as it was compiled, or as both models were at the last look.

        Args:
            current: the compiled model's state at the last look.
        """
        python = self._python
        if self._agreed is not None and self._agreed[1] is current:
            python = self._agreed[0]
        return python.holds() and same_tensors(self._python.tensors(), self._shared)

    def hand_over_tensors(self) -> None:
        """Take over tensors that were replaced here, where the compiled model has the old ones."""
        now = self._python.tensors()
        if len(now) != len(self._shared):
            return  # told apart by their names
        names = self._python.tensor_slots()
        for (path, name), old, new in zip(names, self._shared, now, strict=True):
            if new is not old:
                holder = _tensors_of(self._compiled, path, name)
                if holder is not None:
                    holder[name] = followed(holder[name], old, new)
        self._shared = now

    @property
    def merges(self) -> list[list[str]]:
        """Which adapters are merged into weights, as each layer of peft's keeps it."""
        return self._adapters.merges

    def follow_adapters(self) -> None:
        """Do to the compiled model's adapters what was done to those of the original.

        Raises:
            ChangedError, UnsupportedError: adapters are merged in one of the two, or disabled.
        """
        self._followed |= self._adapters.follow()

    def check(self, read: frozenset[str]) -> PythonState | None:
        """Refuse changes of the original alone; return what it is now, if both models have changes.

        Args:
            read: every attribute and key that anything captured has read.

        Raises:
            ChangedError: it was changed, and the compiled model was not.
        """
        if self._python.holds():
            self._followed = False
            return None
        changes = [
            c
            for c in self._python.changes()
            if (c.concerns(read) or self._runs_as_it_is(c))
            and not c.idle
            and not _is_own(c)
            and not self._is_gone(c)
        ]
        if not changes:
            self._watch_anew()
            return None
        compiled, changed = self._watched(self._compiled), self._first.changed_paths()
        alone = [c for c in changes if not self._is_in_both(c, compiled, c.path in changed)]
        if alone:
            raise ChangedError(
                f"{', '.join(map(str, alone[:3]))} of the original model was changed after "
                f"{type(self._compiled).__name__} was compiled, but not of the compiled model; do "
                "the same to both, undo it, or compile again"
            )
        if self._followed:  # there may be other modules now, whose tensors are to be watched
            self._watch_anew()
            return None
        return self._watched(self._model)

    def _runs_as_it_is(self, change: Change) -> bool:
        """Return whether a change is of what stands around a decoder: that is not captured."""
        if not self._inside or self._request.intersection(change.names):
            return False
        return not f"{change.holder}.".startswith(f"{self._inside}.")

    def _watch_anew(self) -> None:
        """Take what is there now for what both models are."""
        self._python, self._followed = self._watched(self._model), False
        self._shared = self._python.tensors()
        self._adapters.gone = ()

    def _is_gone(self, change: Change) -> bool:
        """Return whether a change is that a layer of peft's was taken off, which was followed."""
        gone = self._adapters.gone
        return any(change.holder == p or change.holder.startswith(f"{p}.") for p in gone)

    def agree(self, python: PythonState | None, state: State) -> None:
        """Remember that both models have the changes of `python`, the compiled one in `state`."""
        self._agreed = (python, state) if python is not None else None

    def _is_in_both(self, change: Change, compiled: PythonState, changed: bool) -> bool:
        """Return whether what holds a change holds the same in the compiled model.

        Args:
            change: of the original.
            compiled: what the compiled model holds now.
            changed: whether that was changed there as well. Then tensors in it may be the compiled
                model's own; else they must be the same, or it has the old ones.
        """
        same = alike if changed else equal
        theirs, ours = self._python.container(change.holder), compiled.container(change.holder)
        if theirs is None or ours is None:
            return False
        if change.names and isinstance(theirs, dict) and isinstance(ours, dict):
            name, absent = change.names[-1], object()
            if name in theirs or name in ours:
                return same(theirs.get(name, absent), ours.get(name, absent))
            if len(change.names) == 1:  # an attribute that both have lost
                return True
        values = ([*c.values()] if isinstance(c, dict) else [*c] for c in (theirs, ours))
        return same(*values)


def _is_own(change: Change) -> bool:
    return bool(_OWN.intersection(change.names))


def _tensors_of(model: nn.Module, path: str, name: str) -> dict[str, Any] | None:
    """Return the dictionary of parameters or of buffers that has `name` in the module at `path`."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    for holder in (module._parameters, module._buffers):
        if name in holder:
            return holder
    return None
