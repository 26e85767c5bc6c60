"""Every interface of torch that this package uses and torch does not promise.

``pyproject.toml`` caps the versions of torch for what is here, and lets no other file of the
package import it. ``docs/explanation/private-interfaces.md`` lists the modules.
"""

from __future__ import annotations

import importlib
import logging
import re
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from torch._dynamo import convert_frame
from torch._dynamo.symbolic_convert import InstructionTranslator, InstructionTranslatorBase
from torch._dynamo.variables.torch import tracing_state_functions
from torch._guards import TracingContext, tracing
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

# What is used as it is:
# - PythonPrinter: a shape guard's expression as Python text, to be evaluated without Dynamo;
# - ShapeEnv: which guards and ranges the lengths of a capture have;
# - TracingContext, tracing: pieces are compiled under the context that the graph was traced in.
__all__ = ["PythonPrinter", "ShapeEnv", "TracingContext", "tracing"]

#: Held while anything is traced or compiled, here and by torch.compile elsewhere: what both switch
#: off meanwhile is global.
one_at_a_time = convert_frame.compile_lock

# Tracing -----------------------------------------------------------------------------------------


def is_disabled() -> bool:
    """Return whether Dynamo is switched off in this process (TORCHDYNAMO_DISABLE and the like)."""
    return bool(torch._dynamo.config.disable)


def forget_code(code: types.CodeType) -> None:
    """Remove what Dynamo keeps of a code object: its cache entries hold the traced graph."""
    torch._dynamo.eval_frame.reset_code(code)  # type: ignore[attr-defined]


def no_collection_after_compiling() -> AbstractContextManager[Any]:
    """Keep Dynamo from running a garbage collection of its own after a trace."""
    context: AbstractContextManager[Any] = torch._dynamo.config.patch(run_gc_after_compile=False)
    return context


def guarding_hooks() -> AbstractContextManager[Any]:
    """Let Dynamo guard the hooks of modules, which it leaves out by default."""
    context: AbstractContextManager[Any] = torch._dynamo.config.patch(
        skip_nnmodule_hook_guards=False
    )
    return context


def without_stack_texts() -> AbstractContextManager[Any]:
    """Keep Dynamo from writing the stack's text for every node: a tenth of a trace's time."""
    return patch.object(
        InstructionTranslatorBase, "is_co_filename_from_nn_modules", lambda _translator: True
    )


@contextmanager
def not_exporting() -> Iterator[None]:
    """Let `torch.compiler.is_exporting` be false where Dynamo traces it.

    Dynamo of 2.11 takes it for true in every trace (2.13 does not): Mamba has other code then. (Its
    table is changed and not the function, which Dynamo's caches know by identity.)
    """
    functions: MutableMapping[Any, Any] = tracing_state_functions()
    with patch.dict(functions, {torch.compiler.is_exporting: False}):
        yield


def scan_module() -> types.ModuleType:
    """Return the module whose ``associative_scan`` models call, by way of Dynamo.

    The function has the same name as its module, so that an import would give the function.
    """
    return importlib.import_module("torch._higher_order_ops.associative_scan")


# Inside Dynamo's backend -------------------------------------------------------------------------


def source_name(source: Any) -> str:
    """Return a Dynamo source as Python text: ``name`` is a property since 2.12, a method before."""
    name = source.name
    return str(name() if callable(name) else name)


def source_of(placeholder: fx.Node) -> str:
    """Return where a placeholder's value comes from, as Python text over ``L`` and globals."""
    return source_name(placeholder._dynamo_source)  # type: ignore[attr-defined]


def constant_lengths() -> Iterator[tuple[str, int, int]]:
    """Yield the lengths that were marked dynamic and became constants in the current trace.

    Yields:
        The name of the argument, the dimension and its constant size.
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
                yield re.findall(r"\['(\w+)'\]", source_name(tracked.source))[-1], dim, constant


def modified_sources() -> Iterator[Any]:
    """Yield the sources of the Python objects that the function being traced has changed."""
    effects = InstructionTranslator.current_tx().output.side_effects
    for variable in effects.id_to_variable.values():
        changed = effects.is_modified(variable) and not _is_restored(variable)
        if changed and variable.source is not None:
            yield variable.source


def _is_restored(variable: Any) -> bool:
    """Return whether a dictionary holds again what it held before it was changed."""
    before = getattr(variable, "original_items", None)  # of a ConstDictVariable
    if before is None or variable.has_new_items():
        return False
    return len(before) == int(variable.len())


def guarded_sources() -> Iterator[tuple[Any, str]]:
    """Yield what the function being traced has read, by the guards that Dynamo has collected.

    Yields:
        A source, and the attribute or key that was asked for there; empty for the whole of it.
    """
    for guard in TracingContext.get().guards_context.dynamo_guards:
        asked: Mapping[str, Any] = getattr(guard.create_fn, "keywords", {})
        yield guard.originating_source, str(asked.get("attr", asked.get("key", "")))


# Fake tensors ------------------------------------------------------------------------------------


def fake_like(example: torch.Tensor) -> torch.Tensor:
    """Return a fake tensor like another one, with storage of its own."""
    assert isinstance(example, FakeTensor)
    meta = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device="meta")
    fake = FakeTensor(example.fake_mode, meta, example.device)
    if isinstance(example, nn.Parameter):
        fake._is_param = True  # as `nn.Parameter` marks tensors of other classes
    return fake.requires_grad_(example.requires_grad)


def bounds_of(size: int | torch.SymInt) -> tuple[int, int | None]:
    """Return the least and the largest value of a size; None where there is no limit."""
    if not isinstance(size, torch.SymInt):
        return size, size
    found = size.node.shape_env.bound_sympy(size.node.expr)
    return int(found.lower), int(found.upper) if found.upper.is_Integer else None


def fake_of_rows(example: torch.Tensor, rows: torch.SymInt | None, count: int) -> torch.Tensor:
    """Return a fake tensor without symbols, with `count` for the symbol that is `rows`, if any.

    Other symbols are what they were while tracing.
    """
    assert isinstance(example, FakeTensor)

    def number(size: int | torch.SymInt) -> int:
        if not isinstance(size, torch.SymInt):
            return size
        value = size.node.expr.subs({} if rows is None else {rows.node.expr: count})
        return int(value) if value.is_Integer else int(size.node.hint)

    sizes, strides = map(number, example.shape), map(number, example.stride())
    meta = torch.empty_strided(tuple(sizes), tuple(strides), dtype=example.dtype, device="meta")
    return FakeTensor(example.fake_mode, meta, example.device)


# Compiling ---------------------------------------------------------------------------------------


def backend_of(name: str) -> Callable[..., Any]:
    """Return a backend of torch.compile by its name: pieces are compiled outside of Dynamo."""
    backend: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    return backend


def start_inductor_workers() -> None:
    """Let the processes in which Inductor compiles kernels start while there is other work."""
    from torch._inductor.async_compile import AsyncCompile, maybe_warm_pool

    maybe_warm_pool()
    # asks whether they are ready, for the first time: until they have answered, none is used
    AsyncCompile.use_process_pool()  # type: ignore[no-untyped-call]


# Tracing for tlparse -----------------------------------------------------------------------------


def is_traced() -> bool:
    """Return whether torch's structured trace has a reader (``TORCH_TRACE``)."""
    handlers = logging.getLogger("torch.__trace").handlers
    return any(handler.level <= logging.DEBUG for handler in handlers)


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Put a text into torch's structured trace, which ``tlparse`` shows; nothing without a reader.

    Args:
        name: Of the artifact.
        payload: Makes the text, where there is a reader.
    """
    if is_traced():  # torch would make the text for handlers that do not take it
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": name, "encoding": "string"},
            payload_fn=payload,
            expect_trace_id=False,  # linking happens outside of a trace
        )


# Fused attention ---------------------------------------------------------------------------------


def cudnn_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention [B, H, T, D] by cuDNN, and the logarithm of its masses, [B, H, T(, 1)].

    Causal attention begins with the first key.
    """
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    output, masses, *_ = attend(query, key, value, None, True, 0.0, causal, scale=scale)
    return output, masses


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return causal attention [B, T, H, D], contiguous, whose queries are the last of the keys."""
    inputs = (t.transpose(1, 2) for t in (query, key, value))
    attend = torch.ops.aten._flash_attention_forward
    sizes = (None, None, query.shape[2], key.shape[2])
    output: torch.Tensor = attend(*inputs, *sizes, 0.0, True, False, scale=scale)[0]
    return output.contiguous()


# Several GPUs ------------------------------------------------------------------------------------


def ranks_of(group: str) -> int:
    """Return how many ranks a process group has, by its name; 1 where there is none."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    module: Any = torch.distributed.distributed_c10d
    return int(module._resolve_process_group(group).size())


def all_reduced(x: torch.Tensor, group: str) -> torch.Tensor:
    """Return the sum over the ranks of a process group; the argument stays as it is."""
    summed = torch.ops._c10d_functional.all_reduce(x, "sum", group)
    total: torch.Tensor = torch.ops._c10d_functional.wait_tensor(summed)
    return total


def symmetric_memory(nbytes: int, device: torch.device, group: str) -> tuple[Any, int, list[int]]:
    """Return zeroed memory that all ranks of a group have mapped; each of them asks for it.

    Returns:
        What it lives by, this rank's place in the group, and the addresses of all ranks' memory.

    Raises:
        RuntimeError: the ranks cannot write into each other's memory.
    """
    module: Any = importlib.import_module("torch.distributed._symmetric_memory")
    memory = module.empty(nbytes, dtype=torch.uint8, device=device)
    handle = module.rendezvous(memory, group)
    memory.zero_()
    torch.cuda.synchronize(device)
    handle.barrier()
    torch.cuda.synchronize(device)
    return (memory, handle), int(handle.rank), list(map(int, handle.buffer_ptrs))
