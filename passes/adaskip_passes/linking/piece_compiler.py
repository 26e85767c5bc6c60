"""Compile pieces, each distinct one once, with any torch.compile backend."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import fx

from .. import _torch
from ..infra.logs import logger_of
from ..infra.pass_base import Pass
from ..infra.pass_manager import run_passes
from ..partition.outer import Piece
from ..tracing.capture import Capture
from ..tracing.dynamo import one_at_a_time
from .direct_call import without_wrappers
from .link import Compiled
from .precompile import compile_ahead

_LOG = logger_of(__name__)

#: Inductor's options for short kernels: those that do not depend on each other become one, and
#: each starts while the one before it ends.
_SHORT_KERNELS = {"combo_kernels": True, "triton.enable_pdl": True}


def start_workers(backend: str, device: torch.device) -> None:
    """Let the processes in which Inductor compiles kernels start while there is other work."""
    if backend == "inductor" and device.type == "cuda":
        _torch.start_inductor_workers()


class PieceCompiler:
    """Compiled pieces of one capture, by structural key.

    Attributes:
        backend: name of the inner backend (``inductor``, ``eager``, ``aot_eager``, ...).
        lowering: inner passes that each piece goes through first.
        short_kernels: whether Inductor's kernels take microseconds, as those of a step.
        compiled: how many pieces it has compiled.
        seconds: how long that took in all.
    """

    def __init__(
        self,
        capture: Capture,
        backend: str,
        lowering: Sequence[Pass] = (),
        *,
        short_kernels: bool = False,
    ) -> None:
        self.capture = capture
        self.backend = backend
        self.lowering = tuple(lowering)
        self.short_kernels = short_kernels
        self.compiled = 0
        self.seconds = 0.0
        self._inner = _torch.backend_of(backend)
        self._by_key: dict[str, Compiled] = {}

    def __call__(self, piece: Piece) -> Compiled:
        """Return the callable of a piece, compiled at the first call with its key, by one caller.

        Args:
            piece: The piece; another one with an equal key gets the same callable.

        """
        found = self._by_key.get(piece.key)
        if found is None:
            with one_at_a_time:
                found = self._by_key.get(piece.key)
                if found is None:
                    found = self._by_key[piece.key] = self.compile(piece.module, piece.name)
        return found

    def compile(self, module: fx.GraphModule, name: str = "a whole graph") -> Compiled:
        """Compile a copy of a graph for its placeholders' example values.

        Nothing else is traced or compiled meanwhile: compilers switch off what is global.

        Args:
            module: The graph.
            name: What the log calls it.
        """
        with one_at_a_time:
            before = self.seconds
            function = self._compile(module)
            _LOG.info("compiled %s with %s in %.2f s", name, self.backend, self.seconds - before)
            return function

    def _compile(self, module: fx.GraphModule) -> Compiled:
        start = time.perf_counter()
        graph = fx.Graph()
        result = graph.graph_copy(module.graph, {})
        single = not isinstance(result, tuple | list)
        graph.output((result,) if single else result)  # backends expect a graph to return a tuple
        lowered = fx.GraphModule(module, graph, "Piece")
        run_passes(lowered, self.lowering, copy=False)
        kernels = compile_ahead(lowered)
        examples = [n.meta["example_value"] for n in graph.find_nodes(op="placeholder")]
        with self.capture.reopened():
            options = {"config_patches": _SHORT_KERNELS} if self.short_kernels else {}
            function: Compiled = self._inner(lowered, examples, **options)
        if not any(isinstance(e, torch.Tensor) and e.is_cuda for e in examples):
            function = without_wrappers(function)  # (a GPU does not wait for the host's calls)
        for kernel in kernels:
            kernel.result()
        self.compiled += 1
        self.seconds += time.perf_counter() - start
        return (lambda *inputs: function(*inputs)[0]) if single else function
