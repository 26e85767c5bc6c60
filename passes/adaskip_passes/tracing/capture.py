"""Capture a function once with Dynamo, so that it can be run without Dynamo from then on.

A Dynamo backend receives the graph. Every placeholder says where its value comes from, as an
expression over the function's arguments (``L['past_key_values'].layers[0].keys``), and the shape
environment holds the guards under which the graph is right. A :class:`Capture` keeps all of that;
who runs the graph binds the inputs and checks the guards, which costs microseconds
where Dynamo's guard evaluation costs 0.4-0.9 ms a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import fx

from ..errors import UnsupportedError
from ..infra.logs import logger_of
from ..infra.pass_manager import run_passes
from . import dynamo
from .reads import Reads
from .repeated_layers.expand import Expand
from .repeated_layers.mark import First, NotRepeatedError, Repeat, marked

_LOG = logger_of(__name__)

Built = TypeVar("Built")
Binder = Callable[[Mapping[str, Any]], tuple[Any, ...]]

_SWITCHED_OFF = (
    "torch.compile ran {} without compiling it. Is Dynamo switched off "
    "(TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE, torch.compiler.set_stance)?"
)


@dataclass(frozen=True)
class Capture:
    """One graph as Dynamo gave it, and what is needed to run it without Dynamo.

    Attributes:
        graph: the captured graph; passes work on copies of it.
        sources: for each placeholder, a Python expression over ``L`` (the captured function's
            arguments by name) and the function's globals.
        tracing: the tracing context, under which pieces of the graph are compiled.
        scope: the globals that the sources may refer to.
        python_effects: attributes and containers, of the arguments or of globals, that the function
            changed while it was traced; a graph cannot repeat that.
        reads: what the function looked at in Python (see `Reads`).
        copied: how many modules were not traced but copied from another (see `Repeat`).
        why_traced: why none was, though there are some that are alike; empty if that is not so.
    """

    graph: fx.GraphModule
    sources: tuple[str, ...]
    tracing: dynamo.TracingContext
    scope: dict[str, Any] = field(repr=False)
    python_effects: tuple[str, ...] = ()
    reads: Reads = field(default_factory=Reads, repr=False)
    copied: int = 0
    why_traced: str = ""

    @property
    def shape_env(self) -> dynamo.ShapeEnv | None:
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
            if dynamo.TracingContext.try_get() is self.tracing:
                yield
            else:
                with dynamo.tracing(self.tracing):
                    yield
        finally:
            if env is not None:
                env.frozen = frozen

    def binder(self, sources: Sequence[str]) -> Binder:
        """Return a function from the captured function's arguments to the values of `sources`."""
        body = ", ".join(sources) + ("," if len(sources) == 1 else "")
        return eval(f"lambda L: ({body})", self.names())  # type: ignore[no-any-return]

    def names(self) -> dict[str, Any]:
        """Return what source expressions may refer to besides ``L``."""
        return {**self.scope, "G": self.scope}

    def shape_guards(self) -> ShapeGuards:
        """Return what must hold of the arguments' shapes, as recorded until now."""
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
        """Return the guards that a capture has recorded until now.

        Args:
            capture: The capture.

        Raises:
            UnsupportedError: A guard is about something that no input tells.
        """
        env, printer = capture.shape_env, dynamo.PythonPrinter()
        known = dynamo.symbol_sources(env) if env is not None else {}
        conditions: dict[str, None] = {}
        symbols: dict[str, str] = {}
        for guard in env.guards if env is not None else ():
            text = printer.doprint(guard.expr)
            free = {str(s) for s in guard.expr.free_symbols}
            if not free <= known.keys():
                raise UnsupportedError(f"the shape guard {text} is about no input's size or stride")
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
        """Return whether the graph is right for these arguments of the captured function."""
        return self._check(arguments)

    def broken(self, arguments: Mapping[str, Any]) -> list[str]:
        """Return the conditions that do not hold, for an error message."""
        values = {s: eval(e, dict(self._scope), {"L": arguments}) for s, e in self.symbols.items()}
        return [c for c in self.conditions if not eval(c, {}, dict(values))]


def capture(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    build: Callable[[Capture], Built],
    repeat: Repeat | None = None,
    exchange: dynamo.Exchange = nullcontext,
) -> Built:
    """Trace ``function(**arguments)`` into one graph and give it to `build`.

    The function is not run (unless Dynamo is switched off by a stance, which is then refused).
    `build` is called inside the Dynamo backend, so what it compiles
    records its shape guards with the capture. Each call is a new trace, whatever was captured
    before: the function gets a code object of its own, so neither Dynamo's cache nor its recompile
    limit (8 for a code object) sees the others.

    Args:
        function: a plain Python function, without closure.
        arguments: by name; mark lengths with ``torch._dynamo.mark_dynamic`` beforehand.
        build: receives the capture; its result is returned.
        repeat: modules that the function calls one after the other; of those that are alike two
            are traced, which saves most of the time. The graph is the same.
        exchange: a context in which Dynamo reads other code; see `dynamo.trace`.

    Raises:
        UnsupportedError: when Dynamo cannot make one graph of the function.
        Exception: whatever `build` raised.
    """
    if dynamo.is_disabled():
        raise UnsupportedError(_SWITCHED_OFF.format(function.__name__))
    why_traced = ""
    with dynamo.one_at_a_time:  # the modules are marked meanwhile
        first = repeat.first() if repeat is not None else {}
        if repeat is not None and first:
            try:
                with marked(repeat, first):
                    return _captured(
                        function,
                        arguments,
                        lambda c: build(_expanded(c, arguments, repeat, first)),
                        exchange,
                    )
            except (NotRepeatedError, dynamo.NoGraphError) as reason:
                why_traced = str(reason)
    try:
        return _captured(
            function, arguments, lambda c: build(replace(c, why_traced=why_traced)), exchange
        )
    except dynamo.NoGraphError as error:
        raise UnsupportedError(
            f"torch.compile cannot capture {function.__name__} as one graph: {error}. The model's "
            "forward must be traceable with fullgraph=True; run it under "
            "torch.compile(fullgraph=True) to see where it breaks."
        ) from error.__cause__


def _captured(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    build: Callable[[Capture], Built],
    exchange: dynamo.Exchange,
) -> Built:
    """Trace once; `build` receives what the trace gave."""
    start = time.perf_counter()
    traced = dynamo.own_code(function)
    built: list[Built] = []

    def receive(graph: fx.GraphModule) -> None:
        dynamo.refuse_constant_lengths(function)
        # a copy: Dynamo takes its own names out of the function's globals when it is left
        described = describe(graph, dict(traced.__globals__), arguments)
        _LOG.info(
            "captured %s: %d nodes in %.2f s",
            function.__name__,
            len(graph.graph.nodes),
            time.perf_counter() - start,
        )
        built.append(build(described))
        if described.shape_env is not None:
            described.shape_env.freeze()
            # a cycle through C++, which no collection finds; nothing asks for them any more
            described.shape_env.tracked_fakes = None

    dynamo.trace(traced, arguments, receive, exchange)
    if not built:
        raise UnsupportedError(_SWITCHED_OFF.format(function.__name__))
    return built[0]


def _expanded(
    described: Capture, arguments: Mapping[str, Any], repeat: Repeat, first: First
) -> Capture:
    """Return the capture with every module in it, where only two of each kind were traced."""
    if described.python_effects:
        raise NotRepeatedError(f"{', '.join(described.python_effects)} is changed")
    names, placeholders = described.names(), described.graph.graph.find_nodes(op="placeholder")
    sources = dict(zip(placeholders, described.sources, strict=True))
    rewrite = Expand(sources, lambda text: eval(text, names, {"L": arguments}), repeat, first)
    run_passes(described.graph, (rewrite,), copy=False)
    return replace(
        described,
        sources=tuple(sources.values()),
        copied=len(first) - len({r for r, _ in first.values()}),
    )


def describe(
    graph: fx.GraphModule,
    scope: dict[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Capture:
    """Return the capture of a graph that a Dynamo backend was just called with, inside that call.

    Args:
        graph: what Dynamo handed to the backend.
        scope: globals of the traced function, if its inputs are to be bound by source later.
        arguments: of the function by name, likewise.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    return Capture(
        graph=graph,
        sources=tuple(map(dynamo.source_of, placeholders)),
        tracing=dynamo.TracingContext.get(),
        scope=scope if scope is not None else {},
        python_effects=dynamo.python_effects(),
        reads=Reads.of(dynamo.guarded(), scope, arguments or {}) if scope is not None else Reads(),
    )
