"""Compile pieces, each distinct one once, with any torch.compile backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..decode.precompile import compile_ahead
from ..partition.outline import Piece
from ..tracing.capture import Capture
from ..tracing.dynamo import one_at_a_time
from ..transforms.pass_manager import Pass
from .link import Compiled

#: Inductor's options for lowered pieces. What is left to it are kernels of microseconds: those
#: that do not depend on each other become one, and each starts while the one before it ends.
_SHORT_KERNELS = {"combo_kernels": True, "triton.enable_pdl": True}


def start_workers(backend: str, device: torch.device) -> None:
    """Let the processes in which Inductor compiles kernels start while there is other work."""
    if backend == "inductor" and device.type == "cuda":
        from torch._inductor.async_compile import AsyncCompile, maybe_warm_pool

        maybe_warm_pool()
        # asks whether they are ready, for the first time: until they have answered, none is used
        AsyncCompile.use_process_pool()  # type: ignore[no-untyped-call]


class PieceCompiler:
    """Compiled pieces of one capture, by structural key.

    Attributes:
        backend: name of the inner backend (``inductor``, ``eager``, ``aot_eager``, ...).
        lowering: inner passes that each piece goes through first.
        compiled: how many pieces it has compiled.
        seconds: how long that took in all.
    """

    def __init__(self, capture: Capture, backend: str, lowering: Sequence[Pass] = ()) -> None:
        self.capture = capture
        self.backend = backend
        self.lowering = tuple(lowering)
        self.compiled = 0
        self.seconds = 0.0
        self._inner: Callable[..., Any] = torch._dynamo.lookup_backend(backend)
        self._by_key: dict[str, Compiled] = {}

    def __call__(self, piece: Piece) -> Compiled:
        """The callable of a piece, compiled at the first call with its key, by one caller."""
        found = self._by_key.get(piece.key)
        if found is None:
            with one_at_a_time:
                found = self._by_key.get(piece.key)
                if found is None:
                    found = self._by_key[piece.key] = self.compile(piece.module)
        return found

    def compile(self, module: fx.GraphModule) -> Compiled:
        """Compile a copy of `module` for its placeholders' example values.

        Nothing else is traced or compiled meanwhile: compilers switch off what is global.
        """
        with one_at_a_time:
            return self._compile(module)

    def _compile(self, module: fx.GraphModule) -> Compiled:
        start = time.perf_counter()
        graph = fx.Graph()
        result = graph.graph_copy(module.graph, {})
        single = not isinstance(result, tuple | list)
        graph.output((result,) if single else result)  # backends expect a graph to return a tuple
        own = fx.GraphModule(module, graph, "Piece")
        for one in self.lowering:
            one(own)
        if self.lowering:
            own.recompile()
        kernels = compile_ahead(own)
        examples = [n.meta["example_value"] for n in graph.find_nodes(op="placeholder")]
        with self.capture.reopened():
            options = {"config_patches": _SHORT_KERNELS} if self.lowering else {}
            function: Compiled = self._inner(own, examples, **options)
        for kernel in kernels:
            kernel.result()
        self.compiled += 1
        self.seconds += time.perf_counter() - start
        return (lambda *inputs: function(*inputs)[0]) if single else function
