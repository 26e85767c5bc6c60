"""Memory of the CPU that grows in place, and of which parts can be let go: as Linux maps it.

Addresses of an anonymous mapping cost nothing until they are written to, page by page, and
``madvise(MADV_DONTNEED)`` gives pages back: they read as zeros then.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .pieces import Piece, PiecedMemory

_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_NEVER = "2"  # of it: addresses count as memory
_NO_RESERVE = 0x4000  # MAP_NORESERVE, which Python has no name for before 3.13


class HostMemory(PiecedMemory):
    """One anonymous mapping. Tensors of it hold it, and it goes with the last of them."""

    def _reserve(self, size: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._mapping = mmap.mmap(-1, max(size, self.block), flags=flags)
        return 0

    def _map(self, at: int, size: int) -> None:
        """Do nothing: a page comes when it is written to."""

    def _unmap(self, at: int, piece: Piece) -> None:
        self._mapping.madvise(mmap.MADV_DONTNEED, at, piece.size)

    def tensor(self, at: int, size: int, owner: object) -> torch.Tensor:
        """Return some addresses, uint8 [size]; it holds the mapping."""
        return torch.frombuffer(self._mapping, dtype=torch.uint8, count=size, offset=at)

    def here(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context that is none."""
        return contextlib.nullcontext()

    def wait(self) -> None:
        """Return at once: what runs on a CPU is through."""

    def retire(self) -> None:
        """Leave the mapping to those who hold it."""


@cache
def has_free_addresses() -> bool:
    """Return whether addresses cost nothing here: on Linux, unless it counts them as memory."""
    if sys.platform != "linux":
        return False
    import resource  # (which Windows has not)

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return False
    try:
        return _OVERCOMMIT.read_text().strip() != _NEVER
    except OSError:
        return False
