"""Programs that hand out the residual stream after every sublayer, for whoever must look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch

from adaskip_passes import Tap

from ..programs.program import Program
from .runtime import Runtime

Streams = tuple[torch.Tensor, ...]


class RecordingProgram(Program):
    """A program that keeps the streams of its last run."""

    first_passes = (Tap(),)
    composed = False  # the stream after every sublayer is looked at
    last: ClassVar[Streams] = ()

    def run(self, *arguments: object) -> tuple[torch.Tensor, ...]:
        outputs = super().run(*arguments)  # type: ignore[arg-type]
        end = 2 + len(self.phase.sublayers)
        RecordingProgram.last = outputs[1:end]
        return outputs[:1] + outputs[end:]


@contextmanager
def record_residuals(runtime: Runtime) -> Iterator[Callable[[], Streams]]:
    """Meanwhile steps of `runtime` are watched.

    Yields:
        A function that gives the streams [B, T, H] of the last step: before the first sublayer,
        and after each one.
    """
    graphs, fixed = runtime.graphs, runtime.static_cache
    before = graphs.program_type
    graphs.program_type, runtime.static_cache = RecordingProgram, False
    try:
        yield lambda: RecordingProgram.last
    finally:
        graphs.program_type, runtime.static_cache = before, fixed
        RecordingProgram.last = ()
