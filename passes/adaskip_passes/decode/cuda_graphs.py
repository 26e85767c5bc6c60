"""Record what a program launches as a CUDA graph, and replay it.

A step of one token is some two hundred kernels of microseconds each; launched one by one from
Python they take three times as long as they run. A recording is launched at once. All recordings of
a recorder share one pool of memory, so each costs little more than its own nodes; legal as long
as no two of them run at the same time and what is kept is copied out before the next one runs. So
they take turns: where callers have streams of their own, one waits for what the other has begun.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .private_stream import give_back, private_stream


@dataclass(eq=False)
class Recording:
    """What a program launches, as a graph.

    Attributes:
        graph: The graph.
        nbytes: Of the device's memory, that the driver took for it when it was made and when it was
            first launched: PyTorch's allocator, which has the pool that recordings share, is not
            counted.
        launched: Whether it has run.
    """

    graph: torch.cuda.CUDAGraph
    nbytes: int = 0
    launched: bool = False


class Recorder:
    """A recorder of CUDA graphs, on one stream and into one pool of memory.

    Attributes:
        device: a CUDA device.
        recorded: how many graphs it has recorded.
        begun: how many of them have been launched, which takes long the first time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recorded = self.begun = 0
        self._turn = threading.RLock()
        self._last: torch.cuda.Stream | None = None  # that something of the pool ran on
        self._stream = private_stream(device)
        weakref.finalize(self, give_back, self._stream).atexit = False
        self._pool = torch.cuda.graph_pool_handle()
        # the pool must never be without a graph: capturing into one whose last was freed fails
        self._anchor = torch.cuda.CUDAGraph()
        self._capture(lambda: torch.zeros(1, device=device), self._anchor)

    def run(self, body: Callable[[], object]) -> None:
        """Run `body` on the stream of recordings: whatever is set up at first use is then there."""
        with self._in_turn() as current:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                body()
            current.wait_stream(self._stream)

    def replay(self, recording: Recording) -> None:
        """Run what was recorded, on the caller's stream."""
        with self._in_turn():
            if recording.launched:
                recording.graph.replay()
                return
            with self._counted(recording):
                recording.graph.replay()
            recording.launched = True
            self.begun += 1

    @contextmanager
    def _in_turn(self) -> Iterator[torch.cuda.Stream]:
        """Yield the caller's stream, after everything that was begun on another one."""
        with self._turn:
            current = torch.cuda.current_stream(self.device)
            if self._last is not None and self._last != current:
                current.wait_stream(self._last)
            self._last = current
            yield current

    def record(self, body: Callable[[], object]) -> Recording:
        """Return the graph of what `body` launches; nothing is run.

        Args:
            body: What it calls must have run before.

        """
        with self._turn:
            self.recorded += 1
            recording = Recording(torch.cuda.CUDAGraph())
            with self._counted(recording):
                self._capture(body, recording.graph)
            return recording

    @contextmanager
    def _counted(self, recording: Recording) -> Iterator[None]:
        """Count what the driver takes for a graph meanwhile."""
        before = self._taken_by_driver()
        yield
        recording.nbytes += max(0, self._taken_by_driver() - before)

    def _taken_by_driver(self) -> int:
        """Return bytes of the device that are in use, but not by PyTorch's allocator."""
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free - torch.cuda.memory_reserved(self.device))

    def _capture(self, body: Callable[[], object], graph: torch.cuda.CUDAGraph) -> None:
        # not torch.cuda.graph(): that empties the allocator's cache for the whole process, and
        # the next prompt would have to fill it again
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                body()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
