"""Memory of a GPU as its driver maps it: reserved addresses, and pieces of memory behind them.

The driver's calls are those of NVIDIA's ``cuda-bindings``, which PyTorch's CUDA builds install.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

#: What nobody can reach any more, to be unmapped when no graph is being captured.
_retired: deque[Mapped] = deque()


class Piece(NamedTuple):
    """Memory that was mapped at once: from which byte of a range, how many bytes, its handle."""

    begin: int
    size: int
    handle: Any


class Mapped:
    """What the driver holds: ranges of addresses, and the pieces behind them.

    Attributes:
        device: A CUDA device.
        block: Bytes that memory comes in.
        sizes: Bytes of addresses, by range; whole blocks.
        bases: Where each range begins.
        filled: Up to which byte there is memory, by range, apart from what was let go.
        pieces: By range, in order.
    """

    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        """Reserve addresses of ranges; there is no memory behind them yet."""
        self.device = device
        torch.cuda.synchronize()  # there is a context from here on
        driver = bindings()
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = location = driver.CUmemLocation()
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = index_of(device)
        self._properties.location = location
        self._access = driver.CUmemAccessDesc()
        self._access.location = location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        kind = driver.CUmemAllocationGranularity_flags
        self.block = int(
            call(
                "cuMemGetAllocationGranularity",
                self._properties,
                kind.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            )
        )
        self.sizes = [self.rounded(size) for size in sizes]
        self._total = sum(self.sizes)
        self._base = int(call("cuMemAddressReserve", self._total, 0, 0, 0))
        self.bases = [self._base + sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.filled = [0] * len(self.sizes)
        self.pieces: list[list[Piece]] = [[] for _ in self.sizes]

    def rounded(self, size: int) -> int:
        """Return a size in whole blocks."""
        return -(-size // self.block) * self.block

    def extend(self, index: int, needed: int) -> None:
        """Map one piece more, so that there is memory up to byte `needed` of a range."""
        size = self.rounded(needed) - self.filled[index]
        if size <= 0:
            return
        if self.filled[index] + size > self.sizes[index]:
            raise ValueError(f"{needed} bytes of {self.sizes[index]} reserved ones")
        at = self.bases[index] + self.filled[index]
        handle = self._allocate(size)
        with contextlib.ExitStack() as undo:  # what was done if the rest fails
            undo.callback(call, "cuMemRelease", handle)
            call("cuMemMap", at, size, 0, handle, 0)
            undo.callback(call, "cuMemUnmap", at, size)
            call("cuMemSetAccess", at, size, [self._access], 1)
            undo.pop_all()
        self.pieces[index].append(Piece(self.filled[index], size, handle))
        self.filled[index] += size

    def _allocate(self, size: int) -> Any:
        for last in (False, True):
            try:
                return call("cuMemCreate", size, self._properties, 0)
            except torch.OutOfMemoryError:
                if last:
                    raise
                collect()  # and what PyTorch keeps for itself
                torch.cuda.empty_cache()
        raise AssertionError

    def shrink(self, index: int, needed: int) -> None:
        """Unmap from the end whatever reaches beyond `needed` bytes, as it was mapped."""
        pieces = self.pieces[index]
        while pieces and pieces[-1].begin + pieces[-1].size > self.rounded(needed):
            self.let_go(index, pieces[-1])
        self.filled[index] = pieces[-1].begin + pieces[-1].size if pieces else 0

    def has_gaps(self, index: int) -> bool:
        """Return whether a piece was let go before the last one."""
        return sum(piece.size for piece in self.pieces[index]) < self.filled[index]

    def let_go(self, index: int, piece: Piece) -> None:
        """Unmap a piece; what was mapped after it stays where it is."""
        self.pieces[index].remove(piece)
        call("cuMemUnmap", self.bases[index] + piece.begin, piece.size)
        call("cuMemRelease", piece.handle)

    def free(self) -> None:
        """Unmap everything, and give the addresses back."""
        for index in range(len(self.sizes)):
            self.shrink(index, 0)
        call("cuMemAddressFree", self._base, self._total)


def retire(mapped: Mapped) -> None:
    """Unmap what nobody can reach any more; in the middle of a capture that waits."""
    _retired.append(mapped)
    collect()


def collect() -> None:
    """Unmap what nobody can reach any more; it waits for the device if there is anything."""
    while _retired:
        if torch.cuda.is_current_stream_capturing():
            return
        try:
            mapped = _retired.popleft()
        except IndexError:  # another thread was faster
            return
        with torch.cuda.device(mapped.device):  # another thread may have no context yet
            torch.cuda.synchronize()
            mapped.free()


def index_of(device: torch.device) -> int:
    """Return the number of a CUDA device; the current one's where it has none."""
    return device.index if device.index is not None else torch.cuda.current_device()


@cache
def bindings() -> Any:
    """Return the driver's bindings; None where they are not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None


def call(name: str, *arguments: Any) -> Any:
    """Call the driver; returns its result, if there is one."""
    driver = bindings()
    error, *results = getattr(driver, name)(*arguments)
    if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(
            "CUDA out of memory: no room for more keys and values; end other requests, call "
            ".adaskip.free(), or use shorter prompts"
        )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} failed: {error}")
    return results[0] if results else None
