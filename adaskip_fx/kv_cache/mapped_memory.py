"""Memory of a GPU as its driver maps it: reserved addresses, and pieces of memory behind them.

The driver's calls are those of NVIDIA's ``cuda-bindings``, which PyTorch's CUDA builds install.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from .pieces import Piece, PiecedMemory

#: What nobody can reach any more, to be unmapped when no graph is being captured.
_retired: deque[Mapped] = deque()


class Mapped(PiecedMemory):
    """What the driver of a GPU holds; a piece's `handle` is the driver's."""

    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        """Reserve addresses of ranges; there is no memory behind them yet."""
        self.device = device
        collect()
        with self.here():
            torch.cuda.synchronize()  # there is a context from here on
            driver = bindings()
            self._properties = _properties(device)
            self._access = driver.CUmemAccessDesc()
            self._access.location = _location(device)
            self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            super().__init__(granularity(device), sizes)

    def _reserve(self, size: int) -> int:
        return int(call("cuMemAddressReserve", size, 0, 0, 0))

    def here(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the driver's calls are about the device."""
        return torch.cuda.device(self.device)

    def wait(self) -> None:
        """Wait until nothing runs on the device."""
        torch.cuda.synchronize()

    def _map(self, at: int, size: int) -> Any:
        handle = self._allocate(size)
        with contextlib.ExitStack() as undo:  # what was done if the rest fails
            undo.callback(call, "cuMemRelease", handle)
            call("cuMemMap", at, size, 0, handle, 0)
            undo.callback(call, "cuMemUnmap", at, size)
            call("cuMemSetAccess", at, size, [self._access], 1)
            undo.pop_all()
        return handle

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

    def _unmap(self, at: int, piece: Piece) -> None:
        call("cuMemUnmap", at, piece.size)
        call("cuMemRelease", piece.handle)

    def tensor(self, at: int, size: int, owner: object) -> torch.Tensor:
        """Return some addresses, uint8 [size]; there must be memory behind the first one."""
        return torch.as_tensor(_Array(at, size, owner), device=self.device)

    def retire(self) -> None:
        """Unmap everything, since nobody can reach it any more; in a capture that waits."""
        _retired.append(self)
        collect()

    def free(self) -> None:
        """Unmap everything, and give the addresses back."""
        for index in range(len(self.sizes)):
            self.shrink(index, 0)
        call("cuMemAddressFree", self.bases[0], sum(self.sizes))


def collect() -> None:
    """Unmap what nobody can reach any more; it waits for the device if there is anything."""
    while _retired:
        if torch.cuda.is_current_stream_capturing():
            return
        try:
            mapped = _retired.popleft()
        except IndexError:  # another thread was faster
            return
        with mapped.here():  # another thread may have no context yet
            mapped.wait()
            mapped.free()


def granularity(device: torch.device) -> int:
    """Return the bytes that memory of a CUDA device comes in."""
    least = bindings().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(call("cuMemGetAllocationGranularity", _properties(device), least))


def _properties(device: torch.device) -> Any:
    driver = bindings()
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location = _location(device)
    return properties


def _location(device: torch.device) -> Any:
    driver = bindings()
    location = driver.CUmemLocation()
    location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = index_of(device)
    return location


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


class _Array:
    """Addresses, as other libraries see memory of a GPU."""

    def __init__(self, at: int, size: int, owner: object) -> None:
        self._owner = owner  # lives for as long as the tensor that is made of this
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (at, False),
            "version": 3,
        }
