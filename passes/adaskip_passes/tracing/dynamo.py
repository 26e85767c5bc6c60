"""What is needed of Dynamo and FakeTensor beyond their public interfaces.

Torch's private interfaces that capturing relies on are used in this file alone.
"""

from __future__ import annotations

import gc
import itertools
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch import fx, nn
from torch._dynamo import convert_frame
from torch._dynamo.symbolic_convert import InstructionTranslator, InstructionTranslatorBase
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

from ..errors import UnsupportedError
from .linear_scan import one_operator
from .versions import not_exporting, source_name

__all__ = ["PythonPrinter", "ShapeEnv", "TracingContext", "tracing"]  # handed on

_serial = itertools.count()
_CONTEXT = "Developer debug context: "
#: Held while anything is traced or compiled, here and by torch.compile elsewhere: what both switch
#: off meanwhile is global.
one_at_a_time = convert_frame.compile_lock
#: transformers resets a context variable of its own in every call.
_RESET_BY_ALL = "__import_transformers_dot_utils_dot_output_capturing']._active_collector"


class NoGraphError(UnsupportedError):
    """Dynamo cannot make one graph of a function."""


class _Done(BaseException):
    """Leaves Dynamo as soon as there is a graph: its guards and bytecode are not wanted.

    Not an `Exception`, which Dynamo would take for a failure of the backend.
    """


def is_disabled() -> bool:
    """Whether Dynamo is switched off in this process (TORCHDYNAMO_DISABLE and the like)."""
    return bool(torch._dynamo.config.disable)


def own_code(function: Callable[..., Any]) -> types.FunctionType:
    """The same function with a code object and a globals dictionary of its own.

    Raises:
        UnsupportedError: it is no plain function, or has a closure.
    """
    if not isinstance(function, types.FunctionType) or function.__closure__:
        raise UnsupportedError(
            f"only a plain function without closure is captured, not {function!r}"
        )
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    own = types.FunctionType(code, dict(function.__globals__), code.co_name)
    own.__defaults__, own.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return own


def trace(
    own: types.FunctionType, arguments: Mapping[str, Any], receive: Callable[[fx.GraphModule], None]
) -> None:
    """Trace a function of `own_code`; `receive` is handed the graph inside Dynamo's backend.

    Nothing is run, unless Dynamo is switched off by a stance: then `receive` is not called.

    Raises:
        NoGraphError: Dynamo cannot make one graph of the function.
        Exception: whatever `receive` raised.
    """
    failed: list[Exception] = []
    receivers = [receive]  # not `receive` itself: Dynamo keeps every backend for ever

    def backend(graph: fx.GraphModule, example_inputs: list[Any], **_options: Any) -> NoReturn:
        try:
            receivers[0](graph)
        except Exception as error:  # raised below, outside Dynamo, which would wrap it
            failed.append(error)
        raise _Done

    with one_at_a_time, _swept():
        try:
            with _tracing(), warnings.catch_warnings():
                # models ask such functions which libraries are installed, and for what is constant
                warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.")
                # Dynamo makes one of every autograd function that it traces (Bloom's GELU)
                warnings.filterwarnings("ignore", message=".* should not be instantiated")
                torch.compile(own, backend=backend, fullgraph=True)(**arguments)
        except _Done:
            pass
        except Exception as error:
            raise NoGraphError(_summary(error)) from error
        finally:
            receivers.clear()
            torch._dynamo.eval_frame.reset_code(own.__code__)  # type: ignore[attr-defined]
    if failed:
        raise failed.pop()


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
def _tracing() -> Iterator[None]:
    """Trace as is needed here.

    Without the text of a stack for every node: a tenth of the time, and nobody reads it. Hooks are
    guarded, which Dynamo leaves out by default.
    """
    hooks = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
    no_stacks = patch.object(
        InstructionTranslatorBase, "is_co_filename_from_nn_modules", lambda _translator: True
    )
    with no_stacks, hooks, one_operator(), not_exporting():
        yield


def _summary(error: BaseException) -> str:
    """Dynamo's message in a line: its title, and what it was about (an exception, a call)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    title = lines[0].rstrip(".") if lines else type(error).__name__
    about = next((line.partition(_CONTEXT)[2] for line in lines if line.startswith(_CONTEXT)), "")
    return f"{title} ({about})" if about else title


# Inside the backend ------------------------------------------------------------------------------


def refuse_constant_lengths(function: Callable[..., Any]) -> None:
    """Refuse a function for which a length that was marked dynamic must be a constant.

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
                argument = re.findall(r"\['(\w+)'\]", source_name(tracked.source))[-1]
                raise UnsupportedError(
                    f"{function.__name__} is only right where {argument}.shape[{dim}] is "
                    f"{constant}, a length that must vary; its code branches on it"
                )


def python_effects() -> tuple[str, ...]:
    """Of the function being traced: what it has changed that is there afterwards.

    That is Python state of its arguments, and of globals; objects that it has made are not told.
    """
    effects = InstructionTranslator.current_tx().output.side_effects
    changed = (v for v in effects.id_to_variable.values() if effects.is_modified(v))
    sources = {_root_expression(v.source) for v in changed if v.source is not None}
    return tuple(sorted(s for s in sources if s and _RESET_BY_ALL not in s))


def guarded() -> tuple[tuple[str, str], ...]:
    """Of the function being traced: what it has read, and an attribute or key asked for there.

    Dynamo collects guards while it traces, and makes a check of them afterwards; here they only say
    what was looked at. The second is empty where the guard is about the whole of a source.
    """
    found: dict[tuple[str, str], None] = {}
    for guard in TracingContext.get().guards_context.dynamo_guards:
        asked = getattr(guard.create_fn, "keywords", {})
        found[
            _root_expression(guard.originating_source), str(asked.get("attr", asked.get("key", "")))
        ] = None
    return tuple(found)


def source_of(placeholder: fx.Node) -> str:
    """Where a placeholder's value comes from, as Python text over ``L`` and globals."""
    return source_name(placeholder._dynamo_source)  # type: ignore[attr-defined]


def _root_expression(source: Any) -> str:
    try:
        return source_name(source)
    except NotImplementedError:  # an object made while tracing, which no argument holds
        return ""


# What is left of it ------------------------------------------------------------------------------


def symbol_sources(env: ShapeEnv) -> dict[str, str]:
    """For each shape symbol the input size, stride or integer that it stands for."""
    return {
        str(symbol): source_name(sources[0])
        for symbol, sources in env.var_to_sources.items()
        if sources
    }


def fake_like(example: torch.Tensor) -> torch.Tensor:
    """A fake tensor like another one, with storage of its own."""
    assert isinstance(example, FakeTensor)
    meta = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device="meta")
    fake = FakeTensor(example.fake_mode, meta, example.device)
    if isinstance(example, nn.Parameter):
        fake._is_param = True  # as `nn.Parameter` marks tensors of other classes
    return fake.requires_grad_(example.requires_grad)
