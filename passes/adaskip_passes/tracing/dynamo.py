"""Trace a function with Dynamo, and ask the trace what Dynamo knows while it runs.

How to ask is in :mod:`adaskip_passes._torch`; here is what is asked, and what is refused.
"""

from __future__ import annotations

import gc
import itertools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import fx

from .. import _torch
from .._torch import PythonPrinter, ShapeEnv, TracingContext, is_disabled, one_at_a_time, tracing
from ..errors import UnsupportedError
from .linear_scan import one_operator
from .list_slices import plain_slices

__all__ = [  # also used by the modules beside this one
    "PythonPrinter",
    "ShapeEnv",
    "TracingContext",
    "is_disabled",
    "one_at_a_time",
    "tracing",
]

#: What functions are read while a trace lasts is changed in such a context.
Exchange = Callable[[], AbstractContextManager[Any]]

_serial = itertools.count()
#: By so much may what is old have grown; Python collects all of it at 1.25.
_GROWTH = 1.2
#: How many objects were old after the last full collection.
_after_full = [0]
_CONTEXT = "Developer debug context: "
#: transformers resets a context variable of its own in every call.
_RESET_BY_ALL = "__import_transformers_dot_utils_dot_output_capturing']._active_collector"


class NoGraphError(UnsupportedError):
    """Dynamo cannot make one graph of a function."""


class _Done(BaseException):
    """Leave Dynamo as soon as there is a graph: its guards and bytecode are not wanted.

    Not an `Exception`, which Dynamo would take for a failure of the backend.

    """


def own_code(function: Callable[..., Any]) -> types.FunctionType:
    """Return the same function with a code object and a globals dictionary of its own.

    Raises:
        UnsupportedError: it is no plain function, or has a closure.
    """
    if not isinstance(function, types.FunctionType) or function.__closure__:
        raise UnsupportedError(
            f"only a plain function without closure is captured, not {function!r}"
        )
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    copy = types.FunctionType(code, dict(function.__globals__), code.co_name)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy


def trace(
    function: types.FunctionType,
    arguments: Mapping[str, Any],
    receive: Callable[[fx.GraphModule], None],
    exchange: Exchange = nullcontext,
) -> None:
    """Trace a function of `own_code`; `receive` is called with the graph inside Dynamo's backend.

    Nothing is run, unless Dynamo is switched off by a stance: then `receive` is not called.

    Args:
        function: what to trace.
        arguments: by name.
        receive: gets the graph.
        exchange: a context in which Dynamo reads code that computes the same in another way; it
            is left before `receive` is called, which finds what is there otherwise.

    Raises:
        NoGraphError: Dynamo cannot make one graph of the function.
        Exception: whatever `receive` raised.
    """
    failed: list[Exception] = []
    receivers = [receive]  # not `receive` itself: Dynamo never lets go of a backend
    exchanged = ExitStack()

    def backend(graph: fx.GraphModule, example_inputs: list[Any], **_options: Any) -> NoReturn:
        try:
            exchanged.close()
            receivers[0](graph)
        except Exception as error:  # raised below, outside Dynamo, which would wrap it
            failed.append(error)
        raise _Done

    with one_at_a_time, _swept():
        try:
            with _tracing(), exchanged, warnings.catch_warnings():
                exchanged.enter_context(exchange())
                # models ask such functions which libraries are installed, and for what is constant
                warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.")
                # Dynamo makes one of every autograd function that it traces (Bloom's GELU)
                warnings.filterwarnings("ignore", message=".* should not be instantiated")
                torch.compile(function, backend=backend, fullgraph=True)(**arguments)
        except _Done:
            pass
        except Exception as error:
            raise NoGraphError(_summary(error)) from error
        finally:
            receivers.clear()
            _torch.forget_code(function.__code__)
    if failed:
        raise failed.pop()


@contextmanager
def _swept() -> Iterator[None]:
    """Let go of what tracing leaves behind: cycles that hold the frames of the callers.

    In those frames are the tensors of a request. They are young, as nothing is collected meanwhile,
    and stay so while an exception has them. A full collection takes half a second once a graph of a
    large model is in memory; one that would soon come due in a token stream is made here.
    """
    enabled, generation = gc.isenabled(), 0
    gc.disable()
    try:
        with _torch.no_collection_after_compiling():
            yield
        generation = 1
    finally:
        gc.collect(generation)
        if generation and len(gc.get_objects(generation=2)) > _GROWTH * _after_full[0]:
            gc.collect()
            _after_full[0] = len(gc.get_objects(generation=2))
        if enabled:
            gc.enable()


@contextmanager
def _tracing() -> Iterator[None]:
    """Trace as is needed here: see each of the contexts."""
    with (
        _torch.without_stack_texts(),
        _torch.guarding_hooks(),
        one_operator(),
        plain_slices(),
        _torch.not_exporting(),
    ):
        yield


def _summary(error: BaseException) -> str:
    """Return Dynamo's message in a line: its title and what it was about (an exception, a call)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    title = lines[0].rstrip(".") if lines else type(error).__name__
    about = next((line.partition(_CONTEXT)[2] for line in lines if line.startswith(_CONTEXT)), "")
    return f"{title} ({about})" if about else title


# Inside the backend ------------------------------------------------------------------------------


def refuse_constant_lengths(function: Callable[..., Any]) -> None:
    """Refuse a function for which a length that was marked dynamic must be a constant.

    Dynamo itself says so only when it makes guards.
    """
    for argument, dim, constant in _torch.constant_lengths():
        raise UnsupportedError(
            f"{function.__name__} is only right where {argument}.shape[{dim}] is "
            f"{constant}, a length that must vary; its code branches on it"
        )


def python_effects() -> tuple[str, ...]:
    """Return what the function being traced has changed that is there afterwards.

    That is Python state of its arguments, and of globals; objects that it has made are not told.

    """
    sources = {_root_expression(source) for source in _torch.modified_sources()}
    return tuple(sorted(s for s in sources if s and _RESET_BY_ALL not in s))


def guarded() -> tuple[tuple[str, str], ...]:
    """Return what the function being traced has read, and the attribute or key asked for there.

    Dynamo collects guards while it traces, and makes a check of them afterwards; here they only say
    what was looked at. The second is empty where the guard is about the whole of a source.

    """
    found = ((_root_expression(source), asked) for source, asked in _torch.guarded_sources())
    return tuple(dict.fromkeys(found))


def source_of(placeholder: fx.Node) -> str:
    """Return where a placeholder's value comes from, as Python text over ``L`` and globals."""
    return _torch.source_of(placeholder)


def _root_expression(source: Any) -> str:
    try:
        return _torch.source_name(source)
    except NotImplementedError:  # an object made while tracing, which no argument holds
        return ""


# What is left of it ------------------------------------------------------------------------------


def symbol_sources(env: ShapeEnv) -> dict[str, str]:
    """Return for each shape symbol the input size, stride or integer that it stands for."""
    return {
        str(symbol): _torch.source_name(sources[0])
        for symbol, sources in env.var_to_sources.items()
        if sources
    }
