"""Memory that grows in place: addresses are reserved at once, memory is mapped as needed.

A recorded CUDA graph holds addresses, and a buffer that is moved to grow is copied. Here a range
of virtual addresses is reserved for as many tokens as a model can have, which costs nothing, and
physical memory is put behind it as tokens come (CUDA's virtual memory management: Prabhu et al.,
"vAttention", ASPLOS 2025). A mapping takes tens of microseconds, however large it is, where a copy
takes longer the more there is; a block table would cost every kernel that reads the cache an
indirection, and PyTorch's own kernels could not read it. A CPU's memory is mapped by its operating
system in the same way; there it is for what can be let go.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from functools import cache

import torch

from .host_memory import HostMemory, has_free_addresses
from .mapped_memory import Mapped, bindings, call, granularity, index_of
from .pieces import PiecedMemory


class GrowingMemory:
    """Ranges of addresses on one device, each with memory behind its beginning.

    Memory is mapped in pieces, and a piece can be let go where nothing reads it any more.

    Attributes:
        device: a CUDA device, or the CPU.
        sizes: bytes of addresses, by range.
    """

    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        """Reserve addresses; there is no memory behind them yet."""
        self.device = device
        self._mapped: PiecedMemory = (
            Mapped(device, sizes) if device.type == "cuda" else HostMemory(block_of(device), sizes)
        )
        self.sizes = self._mapped.sizes
        # whoever holds a tensor of it holds this object
        weakref.finalize(self, self._mapped.retire).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes of memory behind all ranges."""
        return sum(piece.size for pieces in self._mapped.pieces for piece in pieces)

    @property
    def block(self) -> int:
        """Bytes that memory comes in."""
        return self._mapped.block

    @property
    def filled(self) -> list[int]:
        """Up to which byte there is memory, by range, apart from what was let go."""
        return list(self._mapped.filled)

    def fit(self, needed: Sequence[int], most: int | None = None) -> None:
        """Have memory behind the first `needed` bytes of each range; it is not cleared.

        Args:
            needed: by range.
            most: how many ranges to extend; all if None. Other calls may extend the rest.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        behind = [i for i, size in enumerate(needed) if size > self._mapped.filled[i]]
        with self._mapped.here():
            for index in behind[:most]:
                self._mapped.extend(index, needed[index])

    def extend(self, index: int, end: int, cuts: Sequence[int] = ()) -> None:
        """Have memory up to byte `end` of a range, with a piece of its own up to each of `cuts`.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        with self._mapped.here():
            for cut in (*cuts, end):
                self._mapped.extend(index, cut)

    def let_go(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """Free the pieces that lie within `spans`: of a range, from a byte up to another one.

        The first one stays, since a driver knows no pointer that has no memory behind it. If there
        are others it waits until nothing runs on the device.
        """
        mapped = self._mapped
        within = [
            (index, piece)
            for index, begin, end in spans
            for piece in mapped.pieces[index]
            if max(begin, 1) <= piece.begin and piece.begin + piece.size <= end
        ]
        if not within:
            return
        with self._mapped.here():
            self._mapped.wait()
            for index, piece in within:
                mapped.let_go(index, piece)

    def clear(self, indices: Sequence[int]) -> None:
        """Free all memory of some ranges; it waits until nothing runs on the device."""
        with self._mapped.here():
            self._mapped.wait()
            for index in indices:
                self._mapped.shrink(index, 0)

    def spares(self, needed: Sequence[int]) -> bool:
        """Return whether any range has more memory than so many bytes take, in blocks."""
        pairs = zip(self._mapped.filled, map(self._mapped.rounded, needed), strict=True)
        return any(filled > size for filled, size in pairs)

    def trim(self, needed: Sequence[int]) -> None:
        """Have memory behind the first `needed` bytes of each range and no more; content is lost.

        It waits until nothing runs on the device.
        """
        with self._mapped.here():
            self._mapped.wait()
            for index, bytes_needed in enumerate(needed):
                self._mapped.shrink(index, 0 if self._mapped.has_gaps(index) else bytes_needed)
                self._mapped.extend(index, bytes_needed)

    def tensor(self, index: int, count: int = 1) -> torch.Tensor:
        """Return all addresses of a range, uint8 [bytes]; only what has memory may be used.

        There must be memory behind its first byte.

        Args:
            index: of the range.
            count: how many ranges, one after the other.
        """
        size = sum(self.sizes[index : index + count])
        return self._mapped.tensor(self._mapped.bases[index], size, self)

    def address(self, index: int) -> int:
        """Return where a range begins."""
        return self._mapped.bases[index]


@cache
def is_available(device: torch.device) -> bool:
    """Return whether memory of a device can grow in place.

    It can on an NVIDIA GPU that maps memory (some virtual ones don't), with NVIDIA's bindings, and
    on a CPU under Linux.
    """
    if device.type == "cpu":
        return has_free_addresses()
    if device.type != "cuda" or torch.version.cuda is None or bindings() is None:
        return False
    kind = bindings().CUdevice_attribute
    maps = kind.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    return bool(call("cuDeviceGetAttribute", maps, index_of(device)))


def is_worth_it(device: torch.device, forgets: bool) -> bool:
    """Return whether memory that grows in place is to be used.

    Args:
        device: that it is of.
        forgets: whether part of it can be let go. On a CPU it is used for nothing else: no graph
            holds addresses there, and its allocator has memory at once.
    """
    return (forgets or device.type != "cpu") and is_available(device)


@cache
def block_of(device: torch.device) -> int:
    """Return the bytes that a device's memory comes in."""
    return granularity(device) if device.type == "cuda" else mmap.PAGESIZE
