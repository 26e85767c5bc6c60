"""Memory of a GPU that grows in place: addresses are reserved at once, memory is mapped as needed.

A recorded CUDA graph holds addresses, and a buffer that is moved to grow is copied. Here a range
of virtual addresses is reserved for as many tokens as a model can have, which costs nothing, and
physical memory is put behind it as tokens come (CUDA's virtual memory management: Prabhu et al.,
"vAttention", ASPLOS 2025). A mapping takes tens of microseconds, however large it is, where a copy
takes longer the more there is; a block table would cost every kernel that reads the cache an
indirection, and PyTorch's own kernels could not read it.

The driver's calls are those of NVIDIA's ``cuda-bindings``, which PyTorch's CUDA builds install.
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

#: What nobody can reach any more, to be unmapped when no graph is being captured.
_retired: deque[_Mapped] = deque()


class GrowingMemory:
    """Ranges of addresses on one device, each with memory behind its beginning.

    Memory is mapped in pieces, and a piece can be let go where nothing reads it any more.

    Attributes:
        device: a CUDA device.
        sizes: bytes of addresses, by range.
    """

    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        """Reserve addresses; there is no memory behind them yet."""
        collect()
        self.device = device
        with torch.cuda.device(device):
            self._mapped = _Mapped(device, sizes)
        self.sizes = self._mapped.sizes
        # whoever holds a tensor of it holds this object
        weakref.finalize(self, _retire, self._mapped).atexit = False

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
        with torch.cuda.device(self.device):
            for index in behind[:most]:
                self._mapped.extend(index, needed[index])

    def extend(self, index: int, end: int, cuts: Sequence[int] = ()) -> None:
        """Have memory up to byte `end` of a range, with a piece of its own up to each of `cuts`.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        with torch.cuda.device(self.device):
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
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            for index, piece in within:
                mapped.let_go(index, piece)

    def clear(self, indices: Sequence[int]) -> None:
        """Free all memory of some ranges; it waits until nothing runs on the device."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            for index in indices:
                self._mapped.shrink(index, 0)

    def spares(self, needed: Sequence[int]) -> bool:
        """Return whether there is more than twice the memory that so many bytes take, in blocks."""
        return self.nbytes > 2 * sum(self._mapped.rounded(size) for size in needed)

    def trim(self, needed: Sequence[int]) -> None:
        """Have memory behind the first `needed` bytes of each range and no more; content is lost.

        It waits until nothing runs on the device.
        """
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            for index, bytes_needed in enumerate(needed):
                self._mapped.shrink(index, 0 if self._mapped.has_gaps(index) else bytes_needed)
                self._mapped.extend(index, bytes_needed)

    def tensor(self, index: int) -> torch.Tensor:
        """Return all addresses of a range, uint8 [bytes]; only what has memory may be used.

        There must be memory behind its first byte.
        """
        return torch.as_tensor(_Array(self, index), device=self.device)

    def address(self, index: int) -> int:
        """Return where a range begins."""
        return self._mapped.bases[index]


@cache
def is_available(device: torch.device) -> bool:
    """Return whether memory of a device can grow in place.

    It can on an NVIDIA GPU that maps memory (some virtual ones don't), with NVIDIA's bindings.
    """
    if device.type != "cuda" or torch.version.cuda is None or _driver() is None:
        return False
    kind = _driver().CUdevice_attribute
    maps = kind.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    return bool(_call("cuDeviceGetAttribute", maps, _index(device)))


def _retire(mapped: _Mapped) -> None:
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


class _Array:
    """A range, as other libraries see memory of a GPU."""

    def __init__(self, memory: GrowingMemory, index: int) -> None:
        self._memory = memory  # lives for as long as the tensor that is made of this
        self.__cuda_array_interface__ = {
            "shape": (memory.sizes[index],),
            "typestr": "|u1",
            "data": (memory.address(index), False),
            "version": 3,
        }


class _Piece(NamedTuple):
    """Memory that was mapped at once: from which byte of a range, how many bytes, its handle."""

    begin: int
    size: int
    handle: Any


class _Mapped:
    """What the driver holds for a `GrowingMemory`."""

    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        self.device = device
        torch.cuda.synchronize()  # there is a context from here on
        driver = _driver()
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = location = driver.CUmemLocation()
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = _index(device)
        self._properties.location = location
        self._access = driver.CUmemAccessDesc()
        self._access.location = location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        kind = driver.CUmemAllocationGranularity_flags
        self.block = int(
            _call(
                "cuMemGetAllocationGranularity",
                self._properties,
                kind.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            )
        )
        self.sizes = [self.rounded(size) for size in sizes]
        self._total = sum(self.sizes)
        self._base = int(_call("cuMemAddressReserve", self._total, 0, 0, 0))
        self.bases = [self._base + sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.filled = [0] * len(self.sizes)
        self.pieces: list[list[_Piece]] = [[] for _ in self.sizes]

    def rounded(self, size: int) -> int:
        """Return a size in whole blocks."""
        return -(-size // self.block) * self.block

    def extend(self, index: int, needed: int) -> None:
        size = self.rounded(needed) - self.filled[index]
        if size <= 0:
            return
        if self.filled[index] + size > self.sizes[index]:
            raise ValueError(f"{needed} bytes of {self.sizes[index]} reserved ones")
        at = self.bases[index] + self.filled[index]
        handle = self._allocate(size)
        with contextlib.ExitStack() as undo:  # what was done if the rest fails
            undo.callback(_call, "cuMemRelease", handle)
            _call("cuMemMap", at, size, 0, handle, 0)
            undo.callback(_call, "cuMemUnmap", at, size)
            _call("cuMemSetAccess", at, size, [self._access], 1)
            undo.pop_all()
        self.pieces[index].append(_Piece(self.filled[index], size, handle))
        self.filled[index] += size

    def _allocate(self, size: int) -> Any:
        for last in (False, True):
            try:
                return _call("cuMemCreate", size, self._properties, 0)
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
        return sum(piece.size for piece in self.pieces[index]) < self.filled[index]

    def let_go(self, index: int, piece: _Piece) -> None:
        self.pieces[index].remove(piece)
        _call("cuMemUnmap", self.bases[index] + piece.begin, piece.size)
        _call("cuMemRelease", piece.handle)

    def free(self) -> None:
        for index in range(len(self.sizes)):
            self.shrink(index, 0)
        _call("cuMemAddressFree", self._base, self._total)


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


@cache
def _driver() -> Any:
    """Return the driver's bindings; None where they are not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None


def _call(name: str, *arguments: Any) -> Any:
    """Call the driver; returns its result, if there is one."""
    driver = _driver()
    error, *results = getattr(driver, name)(*arguments)
    if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(
            "CUDA out of memory: no room for more keys and values; end other requests, call "
            ".adaskip.free(), or use shorter prompts"
        )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} failed: {error}")
    return results[0] if results else None
