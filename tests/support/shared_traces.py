"""One trace for all models of a process that are alike: tracing is most of what tests cost.

A graph is what Dynamo makes of code, attributes and the description of tensors; weights are inputs.
So a model whose every part is the same as that of one traced before has the same graph, and gets a
copy of it. Everything else that `capture_phase` does is done for each model: it is cut, compiled,
linked and checked by itself. `make test-all` traces every model, as do tests that are marked
`traced`.

What is the same is decided by a walk over all that the traced function is given, and by the product
itself for what it reads elsewhere (`Reads.hold`). What the walk does not know is traced.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from adaskip_fx.capture import phase_graph
from adaskip_fx.model.compiled_model import CompiledModel
from adaskip_passes.infra.graph_module import copied
from adaskip_passes.tracing import dynamo
from adaskip_passes.tracing.capture import Capture, capture
from adaskip_passes.tracing.repeated_layers.mark import Repeat

_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
_BY_IDENTITY = (types.BuiltinFunctionType, types.ModuleType, types.CodeType)
#: What a compiled model has besides what it was made of, which is never traced.
_OURS = ("_adaskip", "generation_config")
_MOST = 200


class _UnknownError(Exception):
    """Something of which it is not known what a trace makes of it."""


class Description:
    """What a trace depends on, part by part, as values that can be compared.

    Attributes:
        parts: of all that was walked, in order.
        alive: what is known by its identity, which is its own while it lives.
    """

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.alive: list[Any] = []
        self._numbers: dict[int, tuple[int, Any]] = {}

    def add(self, value: Any) -> None:
        """Describe a value.

        Raises:
            _UnknownError: what a trace makes of it is not known.
        """
        kind = type(value)
        if kind in _PLAIN or kind is bool:
            self.parts.append((kind, repr(value) if kind is float else value))
        elif isinstance(value, enum.Enum):
            self._same(kind, value.name)
        elif id(value) in self._numbers:  # tied weights, and what holds itself
            self.parts.append(("again", self._numbers[id(value)][0]))
        else:
            self._numbers[id(value)] = len(self._numbers), value
            self._part(kind, value)

    def _same(self, *things: Any) -> None:
        self.alive.extend(things)
        self.parts.append(tuple(id(t) if not isinstance(t, str) else t for t in things))

    def _part(self, kind: type, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, tuple | list):
            self._all(kind, value)
        elif isinstance(value, set | frozenset):
            self._all(kind, sorted(value, key=repr))
        elif kind in (dict, OrderedDict, types.MappingProxyType):
            self._all(kind, [part for item in value.items() for part in item])
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._all(kind, (value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            self._all(kind, (value.func, value.args, value.keywords))
        elif isinstance(value, _BY_IDENTITY):
            self._same(value)
        elif hasattr(value, "__dict__") and not isinstance(value, dict):
            self._class(kind)
            left_out = _OURS if isinstance(value, nn.Module) else ()
            self.add({name: held for name, held in vars(value).items() if name not in left_out})
        elif dataclasses.is_dataclass(value):  # with slots
            self._class(kind)
            self.add([getattr(value, field.name) for field in dataclasses.fields(value)])
        else:
            raise _UnknownError(kind)

    def _all(self, kind: type, values: Any) -> None:
        self._class(kind)
        self.parts.append(len(values))
        for value in values:
            self.add(value)

    def _tensor(self, tensor: torch.Tensor) -> None:
        self._class(type(tensor))
        about = tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, tensor.is_leaf
        self.parts.append((*tensor.shape, *tensor.stride(), *about, tensor.is_inference()))
        # of Dynamo's marks there is one that it leaves on all parameters
        marks = {k: v for k, v in vars(tensor).items() if k != "_dynamo_static_input_type"}
        self.add(marks)

    def _class(self, kind: type) -> None:
        """Describe a class by all that its bases hold now: tests replace methods."""
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] in ("builtins", "torch", "collections", "abc"):
                self._same(base)
            elif base is kind and CompiledModel in kind.__mro__:  # one for each model
                self.parts.append(base.__name__)
            else:
                self._same(base.__name__, *vars(base).values())

    def _function(self, function: types.FunctionType) -> None:
        if function.__closure__ is None and not vars(function):
            return self._same(function)
        self._same(function.__code__)
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        self.add((function.__defaults__, function.__kwdefaults__, held, vars(function)))
        return None


class SharedTraces:
    """What was traced in this process, by what it was made of."""

    def __init__(self) -> None:
        self._known: OrderedDict[Any, tuple[Capture, Any]] = OrderedDict()
        self.shared = self.traced = self.unknown = 0

    def capture(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        build: Callable[[Capture], Any],
        repeat: Repeat | None = None,
        exchange: Any = nullcontext,
    ) -> Any:
        """`adaskip_passes.capture`, or a copy of what it gave for others that are alike."""
        description, more = Description(), (repeat, exchange)
        try:
            description.add((function, dict(arguments), exchange))
        except (_UnknownError, ValueError):  # an empty cell of a closure
            self.unknown += 1
            return capture(function, arguments, build, *more)
        surroundings = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        key = *description.parts, *surroundings, torch.get_default_dtype(), repeat is None
        known = self._known.get(key)
        if known is not None and known[0].reads.hold() and not dynamo.is_disabled():
            self.shared += 1
            self._known.move_to_end(key)
            return build(dataclasses.replace(known[0], graph=copied(known[0].graph)))
        made: Capture = capture(function, arguments, lambda found: found, *more)
        self.traced += 1
        kept = dataclasses.replace(made, graph=copied(made.graph))
        self._known[key] = kept, description.alive
        while len(self._known) > _MOST:
            self._known.popitem(last=False)
        return build(made)


_OF_PROCESS = SharedTraces()


@contextmanager
def sharing(traces: SharedTraces = _OF_PROCESS) -> Iterator[SharedTraces]:
    """Meanwhile models that are alike are traced once, if nothing but eager code is made of them.

    (Compilers guard what they specialize on in what a trace keeps, which is shared as well.)
    """
    before = phase_graph.capture_phase, phase_graph.capture

    def capture_phase(*args: Any) -> Any:
        if args[-1] != "eager":
            return before[0](*args)
        phase_graph.capture = traces.capture
        try:
            return before[0](*args)
        finally:
            phase_graph.capture = before[1]

    phase_graph.capture_phase = capture_phase
    try:
        yield traces
    finally:
        phase_graph.capture_phase = before[0]
