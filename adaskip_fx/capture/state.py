"""One state of a compiled model's Python: hooks, adapters, attributes, config values, functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from adaskip_passes import UnsupportedError
from adaskip_passes.tracing.python_state import PythonState
from adaskip_passes.tracing.reads import Reads
from adaskip_passes.tracing.tensor_layout import describe_tensor, sharing

from .same_objects import Tensors, same_tensors

if TYPE_CHECKING:
    from .graph_key import GraphKey
    from .phase_graph import CapturedPhase
    from .reference import ReferenceRun

#: Dictionaries of a module's that make up the tree; one may be exchanged as a whole.
_TREE = frozenset({"_modules", "_parameters", "_buffers"})


class ChangedError(UnsupportedError):
    """A model was changed, and a request that began before needs it as it was."""


@dataclass(eq=False)
class State:
    """One state of a compiled model's Python.

    Attributes:
        reference: what the model does with a few tokens in this state.
        has_own_reference: whether the reference was run in this state; else it is another state's,
            whose layers store the same. (A hook that has effects is refused when it is traced,
            before it is run for a reference.)
        captures: what was captured in this state, by key.
        one_batch: keys of which a graph holds for one number of rows alone.
        reads: what was read in Python for that, each source once.
        tensors: parameters and buffers as of the last look; None while the model is in another
            state, so that weights which nobody has any more are freed.
    """

    reference: ReferenceRun
    has_own_reference: bool = True
    captures: dict[GraphKey, list[CapturedPhase]] = field(default_factory=dict, repr=False)
    one_batch: set[GraphKey] = field(default_factory=set, repr=False)
    reads: list[Reads] = field(default_factory=list, repr=False)
    tensors: Tensors | None = field(init=False, default=None, repr=False)
    _python: PythonState = field(init=False, repr=False)
    _dtypes: list[torch.dtype] = field(init=False, repr=False)
    _layouts: list[Any] = field(init=False, repr=False)
    _sharing: tuple[int, ...] = field(init=False, repr=False)

    def watch(self, python: PythonState) -> None:
        """Take what the model holds now for this state."""
        self._python = python
        self.tensors = now = python.tensors()
        self._dtypes = _dtypes(now)
        self._layouts = [describe_tensor(t) for t in now]
        self._sharing = sharing(now)

    def add(self, captured: CapturedPhase) -> None:
        """Keep a graph that was captured in this state."""
        self.captures.setdefault(captured.key, []).append(captured)
        known = {source for reads in self.reads for source in reads.sources}
        self.reads.append(captured.capture.reads.beyond(known))

    def holds(self) -> bool:
        """Return whether the model is in this state; its tensors may be other ones."""
        if not (self._python.holds() and all(reads.hold() for reads in self.reads)):
            return False
        now = self._python.tensors()
        known = self.tensors is not None and same_tensors(now, self.tensors)
        if not known or _dtypes(now) != self._dtypes:  # `to` may exchange what is in a tensor
            if not self._alike(now):
                return False
            self.tensors = now
        return True

    def holds_but_for(self, read: frozenset[str]) -> bool:
        """Return whether code that reads only the names `read` sees no difference."""
        changes = self._python.changes()
        unread = bool(changes) and not any(change.concerns(read) for change in changes)
        return unread and self._alike(self._python.tensors()) and all(r.hold() for r in self.reads)

    def is_other_code_alone(self) -> bool:
        """Return whether only attributes and hooks differ now: modules and tensors are alike."""
        changes = self._python.changes()
        tree = any(not c.names or _TREE.intersection(c.names) for c in changes)
        return not tree and self._alike(self._python.tensors())

    def _alike(self, tensors: Tensors) -> bool:
        described = [describe_tensor(t) for t in tensors]
        return described == self._layouts and sharing(tensors) == self._sharing

    def changed_paths(self) -> set[str]:
        """Return the paths where Python state is different now."""
        return {change.path for change in self._python.changes()}

    def changes(self) -> list[str]:
        """Return the paths of what is different now, for a message."""
        found = [str(change) for change in self._python.changes()]
        found += [source for reads in self.reads for source in reads.changed()]
        now = self._python.tensors()
        names = self._python.tensor_slots()
        for name, tensor, layout in zip(names, now, self._layouts, strict=False):
            if describe_tensor(tensor) != layout:
                found.append(".".join(name))
        if not found and sharing(now) != self._sharing:
            found.append("which tensors are tied")
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Since:
    """The state of the model that a request began with.

    Attributes:
        state: of the model's Python.
        tensors: its parameters and buffers then, which live as long as the request does.
        merges: the names of adapters that are merged into the original's weights, as each of its
            layers keeps them.
        merged: the same, as it was then.
    """

    state: State
    tensors: Tensors
    merges: Sequence[list[str]] = ()
    merged: Sequence[list[str]] = ()

    @classmethod
    def of(cls, state: State, merges: Sequence[list[str]] = ()) -> Since:
        """Return it for a request that begins now, in the state of the last look."""
        assert state.tensors is not None
        return cls(state, state.tensors, merges, [*map(list, merges)])

    @property
    def weights_were_written(self) -> bool:
        """Whether adapters were merged into weights, or taken out of them, which a step can ask.

        Microseconds; the graphs of the request would add them a second time.
        """
        return self.merges != self.merged


def _dtypes(tensors: Tensors) -> list[torch.dtype]:
    return [t.dtype for t in tensors if t is not None]
