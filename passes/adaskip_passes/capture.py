"""Capture a function once with Dynamo, so that it can be run without Dynamo ever after.

A Dynamo backend receives the graph. Every placeholder says where its value comes from, as an
expression over the function's arguments (``L['past_key_values'].layers[0].keys``), and the shape
environment holds the guards under which the graph is right. A :class:`Capture` keeps all of that;
whoever runs the graph binds the inputs and checks the guards itself, which costs microseconds
where Dynamo's guard evaluation costs 0.4-0.9 ms a call.

Torch's private interfaces that this relies on are used in this file alone.
"""

from __future__ import annotations

import gc
import itertools
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar
from unittest.mock import patch

import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslator, InstructionTranslatorBase
from torch._guards import TracingContext, tracing
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

from .errors import RefusedError

Built = TypeVar("Built")
Binder = Callable[[Mapping[str, Any]], tuple[Any, ...]]

_serial = itertools.count()
_one_at_a_time = threading.RLock()  # as Dynamo does, but what is switched off meanwhile is global

_SWITCHED_OFF = (
    "torch.compile ran {} without compiling it. Is Dynamo switched off "
    "(TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE, torch.compiler.set_stance)?"
)


class _Captured(BaseException):
    """Leaves Dynamo as soon as there is a graph: its guards and bytecode are not wanted.

    Not an `Exception`, which Dynamo would take for a failure of the backend.
    """


@dataclass(frozen=True)
class Capture:
    """One graph as Dynamo gave it, and what is needed to run it without Dynamo.

    Attributes:
        graph: the captured graph; passes work on copies of it.
        sources: for each placeholder, a Python expression over ``L`` (the captured function's
            arguments by name) and the function's globals.
        tracing: the tracing context, under which pieces of the graph are compiled.
        scope: the globals that the sources may refer to.
        python_effects: the arguments' Python attributes and containers that the function changed
            while it was traced; a graph cannot repeat that.
    """

    graph: fx.GraphModule
    sources: tuple[str, ...]
    tracing: TracingContext
    scope: dict[str, Any] = field(repr=False)
    python_effects: tuple[str, ...] = ()

    @property
    def shape_env(self) -> ShapeEnv | None:
        """The shape environment of the capture; None when no length is symbolic."""
        mode = self.tracing.fake_mode
        return mode.shape_env if mode is not None else None

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """Compile under this capture's context; guards recorded meanwhile count."""
        env = self.shape_env
        frozen = env.frozen if env is not None else False
        if env is not None:
            env.frozen = False
        try:
            if TracingContext.try_get() is self.tracing:
                yield
            else:
                with tracing(self.tracing):
                    yield
        finally:
            if env is not None:
                env.frozen = frozen

    def binder(self, sources: Sequence[str]) -> Binder:
        """A function from the captured function's arguments to the values of `sources`."""
        body = ", ".join(sources) + ("," if len(sources) == 1 else "")
        return eval(f"lambda L: ({body})", self.names())  # type: ignore[no-any-return]

    def names(self) -> dict[str, Any]:
        """What source expressions may refer to besides ``L``."""
        return {**self.scope, "G": self.scope}

    def shape_guards(self) -> ShapeGuards:
        """What must hold of the arguments' shapes, as recorded until now."""
        return ShapeGuards.of(self)


@dataclass(frozen=True)
class ShapeGuards:
    """Conditions on input shapes, evaluated in one generated function.

    Attributes:
        conditions: each guard as Python text over the symbols.
        symbols: for each symbol, the source expression that gives its value.
    """

    conditions: tuple[str, ...]
    symbols: Mapping[str, str]
    _check: Callable[[Mapping[str, Any]], bool] = field(repr=False)
    _scope: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, capture: Capture) -> ShapeGuards:
        env, printer = capture.shape_env, PythonPrinter()
        known = _symbol_sources(env) if env is not None else {}
        conditions: dict[str, None] = {}
        symbols: dict[str, str] = {}
        for guard in env.guards if env is not None else ():
            text = printer.doprint(guard.expr)
            free = {str(s) for s in guard.expr.free_symbols}
            if not free <= known.keys():
                raise RefusedError(f"the shape guard {text} is about no input's size or stride")
            conditions[text] = None
            symbols.update({s: known[s] for s in sorted(free)})
        for symbol, bounds in env.var_to_range.items() if env is not None else ():
            name = str(symbol)
            if name not in known or bounds.is_singleton():  # given a fixed value while tracing
                continue
            symbols[name] = known[name]
            if bounds.lower.is_Integer:
                conditions[f"{int(bounds.lower)} <= {name}"] = None
            if bounds.upper.is_Integer:
                conditions[f"{name} <= {int(bounds.upper)}"] = None
        text = " and ".join(f"({c})" for c in conditions) or "True"
        values = ", ".join(f"{name}={source}" for name, source in symbols.items())
        scope = capture.names()
        exec(f"def _holds({', '.join(symbols)}): return {text}", scope)
        check = eval(f"lambda L: _holds({values})", scope)
        return cls(tuple(conditions), symbols, check, scope)

    def hold(self, arguments: Mapping[str, Any]) -> bool:
        """True if the graph is right for these arguments."""
        return self._check(arguments)

    def broken(self, arguments: Mapping[str, Any]) -> list[str]:
        """The conditions that do not hold, for an error message."""
        values = {s: eval(e, dict(self._scope), {"L": arguments}) for s, e in self.symbols.items()}
        return [c for c in self.conditions if not eval(c, {}, dict(values))]


def capture(
    function: Callable[..., Any], arguments: Mapping[str, Any], build: Callable[[Capture], Built]
) -> Built:
    """Trace ``function(**arguments)`` into one graph and hand it to `build`.

    The function is not run (unless Dynamo is switched off by a stance, which is then refused).
    `build` is called inside the Dynamo backend, so what it compiles
    records its shape guards with the capture. Each call traces anew, whatever was captured
    before: the function gets a code object of its own, so neither Dynamo's cache nor its recompile
    limit (8 for a code object) sees the others.

    Args:
        function: a plain Python function, without closure.
        arguments: by name; mark lengths with ``torch._dynamo.mark_dynamic`` beforehand.
        build: receives the capture; its result is returned.

    Raises:
        RefusedError: when Dynamo cannot make one graph of the function.
        Exception: whatever `build` raised.
    """
    if torch._dynamo.config.disable:
        raise RefusedError(_SWITCHED_OFF.format(function.__name__))
    own = _own_code(function)
    built: list[Built] = []
    failed: list[BaseException] = []

    def backend(graph: fx.GraphModule, example_inputs: list[Any], **_options: Any) -> NoReturn:
        try:
            _check_lengths(function)
            # a copy: Dynamo takes its own names out of the function's globals when it is left
            described = describe(graph, dict(own.__globals__))
            built.append(build(described))
            if described.shape_env is not None:
                described.shape_env.freeze()
        except Exception as error:  # raised below, outside Dynamo, which would wrap it
            failed.append(error)
        raise _Captured

    with _one_at_a_time, _swept():
        try:
            with _without_stack_traces():
                torch.compile(own, backend=backend, fullgraph=True)(**arguments)
        except _Captured:
            pass
        except Exception as error:
            raise RefusedError(
                f"torch.compile cannot capture {function.__name__} as one graph: "
                f"{_first_line(error).rstrip('.')}. The model's forward must be traceable with "
                "fullgraph=True; run it under torch.compile(fullgraph=True) to see where it breaks."
            ) from error
        finally:
            torch._dynamo.eval_frame.reset_code(own.__code__)  # type: ignore[attr-defined]
    if failed:
        raise failed[0]
    if not built:
        raise RefusedError(_SWITCHED_OFF.format(function.__name__))
    return built[0]


def _check_lengths(function: Callable[..., Any]) -> None:
    """Refuse, while it is traced, a function for which a length marked dynamic must be a constant.

    Dynamo itself says so only when it makes guards.
    """
    for tracked in InstructionTranslator.current_tx().output.tracked_fakes:
        asked = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for dim, constraint in enumerate(asked):
            if constraint is None or constraint.warn_only:
                continue
            assert isinstance(tracked.fake, torch.Tensor)
            size = tracked.fake.shape[dim]
            constant = size if isinstance(size, int) else size.node.maybe_as_int()
            if constant is not None:
                raise RefusedError(
                    f"{function.__name__} is only right where {_expression(tracked.source)}.size()"
                    f"[{dim}] is {constant}, a length that must vary; its code branches on it"
                )


@contextmanager
def _swept() -> Iterator[None]:
    """Let go of what tracing leaves behind: cycles that hold the frames of whoever called.

    In those frames are the tensors of a request. One full collection, here: it takes half a second
    once a graph of a large model is in memory, and would otherwise come due in a token stream.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch._dynamo.config.patch(run_gc_after_compile=False):
            yield
    finally:
        if enabled:
            gc.enable()
        gc.collect()


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Trace without the text of a stack for every node, a tenth of the time; nobody reads it."""
    with patch.object(
        InstructionTranslatorBase, "is_co_filename_from_nn_modules", lambda _translator: True
    ):
        yield


def _own_code(function: Callable[..., Any]) -> types.FunctionType:
    """The same function with a code object and a globals dictionary of its own."""
    if not isinstance(function, types.FunctionType) or function.__closure__:
        raise RefusedError(f"only a plain function without closure is captured, not {function!r}")
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    own = types.FunctionType(code, dict(function.__globals__), code.co_name)
    own.__defaults__, own.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return own


def describe(graph: fx.GraphModule, scope: dict[str, Any] | None = None) -> Capture:
    """The capture of a graph that a Dynamo backend was just called with, inside that call.

    Args:
        graph: what Dynamo handed to the backend.
        scope: globals of the traced function, if its inputs are to be bound by source later.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    return Capture(
        graph=graph,
        sources=tuple(_expression(node._dynamo_source) for node in placeholders),
        tracing=TracingContext.get(),
        scope=scope if scope is not None else {},
        python_effects=_python_effects(),
    )


def _python_effects() -> tuple[str, ...]:
    """Of the function being traced: which of its arguments' Python state it has changed.

    State elsewhere is left out: transformers resets a context variable of its own in every call.
    """
    effects = InstructionTranslator.current_tx().output.side_effects
    changed = (v for v in effects.id_to_variable.values() if effects.is_modified(v))
    sources = {_root_expression(v.source) for v in changed if v.source is not None}
    return tuple(sorted(s for s in sources if s.startswith("L[")))


def _root_expression(source: Any) -> str:
    try:
        return _expression(source)
    except NotImplementedError:  # an object made while tracing, which no argument holds
        return ""


def _expression(source: Any) -> str:
    """A Dynamo source as Python text (``name`` is a property since 2.12, a method before)."""
    name = source.name
    return str(name() if callable(name) else name)


def _symbol_sources(env: ShapeEnv) -> dict[str, str]:
    """For each shape symbol the input size, stride or integer that it stands for."""
    return {
        str(symbol): _expression(sources[0])
        for symbol, sources in env.var_to_sources.items()
        if sources
    }


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
