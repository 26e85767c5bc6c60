"""Which state of its Python a compiled model is in, and what was captured in each.

A captured graph is right for the hooks, adapters, attributes, config values and functions that
were traced. Two module trees are watched: the compiled model's own, which graphs are captured of,
and the original's, whose tensors it shares.

- Another state of the compiled model's tree is another `State`, with graphs of its own; a few are
  kept, so that going back costs nothing.
- A tensor that is replaced on the original, under its name, is taken over; any other change there
  is refused until it is undone, or done to the compiled model as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from adaskip_passes import UnsupportedError
from adaskip_passes.tracing.dynamo import one_at_a_time
from adaskip_passes.tracing.python_state import Change, PythonState
from adaskip_passes.tracing.reads import Reads
from adaskip_passes.tracing.tensor_layout import describe_tensor, sharing

if TYPE_CHECKING:
    from .phase_graph import CapturedPhase, GraphKey
    from .reference import ReferenceRun

Tensors: TypeAlias = list[torch.Tensor | None]
_MOST_STATES = 8
#: Attributes of a model that say nothing about its forward: ours, and what is copied for a request.
_LEFT_OUT = ("_adaskip", "generation_config")
#: Dictionaries of a module's that make up the tree; one may be exchanged as a whole.
_TREE = frozenset({"_modules", "_parameters", "_buffers"})
#: What each of the two models has for itself, whatever the other one does.
_OWN = frozenset(
    {
        *("training", "gradient_checkpointing", "_gradient_checkpointing_func"),
        *("_attn_implementation", "_attn_implementation_internal"),
    }
)
#: What a compiled model reads of its config besides what is traced.
_READ_BY_US = frozenset(
    {
        *("use_cache", "return_dict", "use_return_dict", "output_hidden_states"),
        *("output_attentions", "output_router_logits"),
    }
)


class ChangedError(UnsupportedError):
    """A model was changed where its request needs it as it was."""


@dataclass(eq=False)
class State:
    """One state of a compiled model's Python.

    Attributes:
        sample: what the model does with a few tokens in this state.
        sampled: whether it is; else it is another state's, whose layers store the same. (A hook
            that has effects is refused when it is traced, before it is run for a sample.)
        captures: what was captured in this state, by key.
        reads: what was read in Python for that, each source once.
        tensors: parameters and buffers as of the last look; None while the model is in another
            state, so that weights which nobody has any more are freed.
    """

    sample: ReferenceRun
    sampled: bool = True
    captures: dict[GraphKey, list[CapturedPhase]] = field(default_factory=dict, repr=False)
    reads: list[Reads] = field(default_factory=list, repr=False)
    tensors: Tensors | None = field(init=False, default=None, repr=False)
    _python: PythonState = field(init=False, repr=False)
    _dtypes: list[torch.dtype] = field(init=False, repr=False)
    _layouts: list[Any] = field(init=False, repr=False)
    _sharing: tuple[int, ...] = field(init=False, repr=False)

    def watch(self, python: PythonState) -> None:
        """Take what is there now for this state."""
        self._python = python
        self.tensors = now = python.tensors()
        self._dtypes = _dtypes(now)
        self._layouts = [describe_tensor(t) for t in now]
        self._sharing = sharing(now)

    def add(self, captured: CapturedPhase) -> None:
        """Keep what was captured in this state."""
        self.captures.setdefault(captured.key, []).append(captured)
        known = {source for reads in self.reads for source in reads.sources}
        self.reads.append(captured.capture.reads.beyond(known))

    def holds(self) -> bool:
        """Whether the model is in this state; its tensors may have been replaced by others."""
        if not (self._python.holds() and all(reads.hold() for reads in self.reads)):
            return False
        now = self._python.tensors()
        known = self.tensors is not None and same(now, self.tensors)
        if not known or _dtypes(now) != self._dtypes:  # `to` may exchange what is in a tensor
            if not self._alike(now):
                return False
            self.tensors = now
        return True

    def holds_but_for(self, read: frozenset[str]) -> bool:
        """Whether all that differs is what code that reads these names does not see."""
        changes = self._python.changes()
        unread = bool(changes) and not any(change.concerns(read) for change in changes)
        return unread and self._alike(self._python.tensors()) and all(r.hold() for r in self.reads)

    def is_other_code_alone(self) -> bool:
        """Whether all that differs now are attributes and hooks: modules and tensors are alike."""
        changes = self._python.changes()
        tree = any(not c.names or _TREE.intersection(c.names) for c in changes)
        return not tree and self._alike(self._python.tensors())

    def _alike(self, tensors: Tensors) -> bool:
        described = [describe_tensor(t) for t in tensors]
        return described == self._layouts and sharing(tensors) == self._sharing

    def changed_paths(self) -> set[str]:
        """Where Python state is different now."""
        return {change.path for change in self._python.changes()}

    def changes(self) -> list[str]:
        """What is different now, as paths, for a message."""
        found = [str(change) for change in self._python.changes()]
        found += [source for reads in self.reads for source in reads.changed()]
        now = self._python.tensors()
        for slot, tensor, layout in zip(
            self._python.tensor_slots(), now, self._layouts, strict=False
        ):
            if describe_tensor(tensor) != layout:
                found.append(".".join(slot))
        if not found and sharing(now) != self._sharing:
            found.append("which tensors are tied")
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Since:
    """What a request began with.

    Attributes:
        state: of the model's Python.
        tensors: its parameters and buffers then, which live as long as the request does.
    """

    state: State
    tensors: Tensors

    @classmethod
    def of(cls, state: State) -> Since:
        """Of a request that begins now, in the state of the last look."""
        assert state.tensors is not None
        return cls(state, state.tensors)


class States:
    """The states that a compiled model was met in, the last one last.

    Attributes:
        model, original: the compiled one, and the one that it was made of.
        first: the state in which they are the same.
    """

    def __init__(
        self, model: PreTrainedModel, original: PreTrainedModel, sample: ReferenceRun
    ) -> None:
        self.model = model
        self.original = original
        self._known = (*PreTrainedModel.__mro__, *_generated(type(model)))
        self._origin = self._watched(original)
        self._agreed: tuple[PythonState, State] | None = None  # of changes that both models have
        self._shared = self._origin.tensors()
        self.first = State(sample)
        self.first.watch(self._watched(model))
        self._all = [self.first]

    @property
    def current(self) -> State:
        """The state at the last look."""
        return self._all[-1]

    @property
    def known(self) -> list[State]:
        """All that are kept."""
        return list(self._all)

    def look(self) -> State:
        """The state that the model is in now.

        Half a millisecond for a model of 32 layers if nothing has changed; a state that was not met
        before is sampled, by running the model on a few tokens.

        Raises:
            ChangedError: the original was changed and the compiled model was not.
            UnsupportedError: the model does not run as it is now.
        """
        current = self.current
        if self._origin_is_same() and current.holds():
            return current
        with one_at_a_time:  # modules are marked while they are traced
            self._follow()
            agreed = self._check_origin()
            state = self._find()
            self._agreed = (agreed, state) if agreed is not None else None
            return state

    def require(self, since: Since) -> None:
        """Refuse to go on if anything has changed since a request began.

        Raises:
            ChangedError: something has.
        """
        state = self.look()
        if state is not since.state:
            changed = self._changes(since.state)
        elif not same(Since.of(state).tensors, since.tensors):
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
        return PythonState(model, _LEFT_OUT, self._known)

    def _names(self) -> frozenset[str]:
        """Every attribute and key that anything captured has read."""
        return _READ_BY_US.union(*(r.names for state in self._all for r in state.reads))

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
        state = State(before.sample, sampled=False)
        if before.is_other_code_alone():
            state.watch(self._watched(self.model))
        else:
            self.sample(state, before)
            state.watch(self._watched(self.model))
        return state

    def sample(self, state: State, before: State | None = None) -> None:
        """Have the model run on a few tokens, in the state it is in, for that state.

        Raises:
            UnsupportedError: it does not run, as it was changed since it was in the state `before`.
        """
        try:
            state.sample = state.sample.rerun(self.model, type(self.original).forward)
            state.sampled = True
        except UnsupportedError as error:
            if before is None:
                raise
            raise UnsupportedError(
                f"{type(self.model).__name__} was changed since it was compiled "
                f"({self._changes(before)}), and does not run as it is now: {error}"
            ) from error

    # The original ----------------------------------------------------------------------------

    def _origin_is_same(self) -> bool:
        """Whether it is as it was when it was compiled, or as both models were at the last look."""
        python = self._origin
        if self._agreed is not None and self._agreed[1] is self.current:
            python = self._agreed[0]
        return python.holds() and same(self._origin.tensors(), self._shared)

    def _follow(self) -> None:
        """Take over tensors that were replaced on the original, where the old ones are in use."""
        now = self._origin.tensors()
        if len(now) != len(self._shared):
            return  # told apart by their names
        slots = self._origin.tensor_slots()
        for (path, name), old, new in zip(slots, self._shared, now, strict=True):
            if new is not old:
                holder = _tensors_of(self.model, path, name)
                if holder is not None and holder[name] is old:
                    holder[name] = new
        self._shared = now

    def _check_origin(self) -> PythonState | None:
        """Refuse changes of the original alone; what it is now, if both models have changes."""
        if self._origin.holds():
            return None
        names = self._names()
        changes = [c for c in self._origin.changes() if c.concerns(names) and not _own(c)]
        if not changes:
            self._origin = self._watched(self.original)
            return None
        mine, own = self._watched(self.model), self.first.changed_paths()
        alone = [c for c in changes if not self._done_to_both(c, mine, c.path in own)]
        if alone:
            raise ChangedError(
                f"{', '.join(map(str, alone[:3]))} of the original model was changed after "
                f"{type(self.model).__name__} was compiled, but not of the compiled model; do the "
                "same to both, undo it, or compile again"
            )
        return self._watched(self.original)

    def _done_to_both(self, change: Change, mine: PythonState, changed: bool) -> bool:
        """Whether what holds a change holds the same in the compiled model.

        `changed`: whether that was changed there as well. Then tensors in it may be the compiled
        model's own; else they must be the same, or it has the old ones.
        """
        equal = _alike if changed else _equal
        theirs, ours = self._origin.container(change.holder), mine.container(change.holder)
        if theirs is None or ours is None:
            return False
        if change.names and isinstance(theirs, dict) and isinstance(ours, dict):
            name, absent = change.names[-1], object()
            if name in theirs or name in ours:
                return equal(theirs.get(name, absent), ours.get(name, absent))
            if len(change.names) == 1:  # an attribute that both have lost
                return True
        values = ([*c.values()] if isinstance(c, dict) else [*c] for c in (theirs, ours))
        return equal(*values)


def _alike(one: Any, other: Any) -> bool:
    """Whether graphs of both are the same: the values of tensors are no matter."""
    return _equal(one, other, lambda a, b: bool(describe_tensor(a) == describe_tensor(b)))


def _own(change: Change) -> bool:
    return bool(_OWN.intersection(change.names))


def _generated(kind: type) -> tuple[type, ...]:
    """The classes that make a compiled model's class of its model's."""
    return tuple(c for c in kind.__mro__ if c is kind or c.__module__.startswith("adaskip_fx."))


def _tensors_of(model: nn.Module, path: str, name: str) -> dict[str, Any] | None:
    """The dictionary of parameters or of buffers that has `name` in the module at `path`."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    for holder in (module._parameters, module._buffers):
        if name in holder:
            return holder
    return None


def _dtypes(tensors: Tensors) -> list[torch.dtype]:
    return [t.dtype for t in tensors if t is not None]


def same(one: Tensors, other: Tensors) -> bool:
    """Whether two lists hold the same tensors, each by identity."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _equal(
    one: Any,
    other: Any,
    tensors: Callable[[Any, Any], bool] = operator.is_,
    above: frozenset[tuple[int, int]] = frozenset(),
) -> bool:
    """Whether code reads the same of both: modules may be two of a class that hold the same.

    Args:
        one, other: any two objects.
        tensors: tells whether two tensors are the same.
        above: pairs that these are held by, which a module may refer back to.
    """
    pair = id(one), id(other)
    if one is other or pair in above:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return tensors(one, other)
    held = (vars(one), vars(other)) if isinstance(one, nn.Module) else (one, other)
    if isinstance(held[0], dict):
        if held[0].keys() != held[1].keys():
            return False
        held = [*held[0].values()], [held[1][key] for key in held[0]]
    if isinstance(held[0], list | tuple):
        within = above | {pair}
        return len(held[0]) == len(held[1]) and all(
            _equal(a, b, tensors, within) for a, b in zip(*held, strict=True)
        )
    try:
        return bool(one == other)
    except Exception:
        return False
