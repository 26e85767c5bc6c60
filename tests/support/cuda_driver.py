"""A driver of memory that keeps books, and refuses what a real one would."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adaskip_fx.kv_cache import growing_memory, mapped_memory, regions
from adaskip_fx.kv_cache.mapped_memory import Mapped

BLOCK = 64


class Driver:
    """A driver that keeps books, and refuses what a real one would.

    What has no memory behind it reads as NaN, and so does new memory; `check` finds what was
    written where there is none.
    """

    def __init__(self, room: int = 10**9) -> None:
        self.room, self.handles, self.mapped, self.next = room, dict[int, int](), {}, 1
        self.usable = set[int]()
        self.reserved, self.free = dict[int, int](), 1000 * BLOCK
        self.bytes = dict[int, torch.Tensor]()
        self.CUresult = SimpleNamespace(CUDA_SUCCESS=0, CUDA_ERROR_OUT_OF_MEMORY=2)
        for name in ("CUmemAllocationProp", "CUmemLocation", "CUmemAccessDesc"):
            setattr(self, name, SimpleNamespace)
        for name in (
            *("CUmemAllocationType", "CUmemLocationType", "CUmemAccess_flags"),
            *("CUmemAllocationGranularity_flags", "CUdevice_attribute"),
        ):
            setattr(self, name, Names())

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple[int, int]:
        return 0, 1

    def cuMemGetAllocationGranularity(self, properties: Any, kind: Any) -> tuple[int, int]:
        assert properties.location.id == 0
        return 0, BLOCK

    def cuMemAddressReserve(self, size: int, *rest: int) -> tuple[int, int]:
        base, self.free = self.free, self.free + size
        self.reserved[base] = size
        self.bytes[base] = torch.full((size,), 255, dtype=torch.uint8)  # NaN of any dtype
        return 0, base

    def cuMemCreate(self, size: int, properties: Any, flags: int) -> tuple[int, int]:
        assert size % BLOCK == 0
        if sum(self.handles.values()) + size > self.room:
            return 2, 0
        self.next += 1
        self.handles[self.next] = size
        return 0, self.next

    def cuMemMap(self, at: int, size: int, offset: int, handle: int, flags: int) -> tuple[int]:
        assert self.handles[handle] == size
        assert not offset
        assert any(base <= at and at + size <= base + n for base, n in self.reserved.items())
        assert all(at + size <= a or a + n <= at for a, (n, _) in self.mapped.items())
        self.mapped[at] = size, handle
        return (0,)

    def cuMemSetAccess(self, at: int, size: int, access: list[Any], count: int) -> tuple[int]:
        assert self.mapped[at][0] == size
        assert count == len(access) == 1
        self.usable.add(at)
        return (0,)

    def cuMemUnmap(self, at: int, size: int) -> tuple[int]:
        assert self.mapped.pop(at)[0] == size
        self.usable.discard(at)
        self.at(at, size).fill_(255)
        return (0,)

    def cuMemRelease(self, handle: int) -> tuple[int]:
        assert handle not in {h for _, h in self.mapped.values()}
        del self.handles[handle]
        return (0,)

    def cuMemAddressFree(self, base: int, size: int) -> tuple[int]:
        assert self.reserved.pop(base) == size
        del self.bytes[base]
        assert not any(base <= at < base + size for at in self.mapped)
        return (0,)

    def at(self, address: int, size: int) -> torch.Tensor:
        """Bytes of a range of addresses, uint8 [size], whether there is memory or not."""
        base = max(b for b in self.reserved if b <= address)
        return self.bytes[base].narrow(0, address - base, size)

    def check(self) -> None:
        """Nothing was written where there is no memory."""
        for base, size in self.reserved.items():
            there = torch.zeros(size, dtype=torch.bool)
            for at in self.usable:
                if base <= at < base + size:
                    there[at - base : at - base + self.mapped[at][0]] = True
            assert (self.bytes[base][~there] == 255).all()

    def behind(self, base: int) -> int:
        """Bytes that can be used from `base` on, without a gap."""
        at = base
        while at in self.usable:
            at += self.mapped[at][0]
        return at - base


class Names:
    def __getattr__(self, name: str) -> str:
        return name


def install(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    monkeypatch.setattr(mapped_memory, "bindings", lambda: driver)
    monkeypatch.setattr(growing_memory, "bindings", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return driver


def install_on_cpu(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    """Have a CPU's buffers grow in place, in the memory of `driver`."""

    def tensor(self: Mapped, at: int, size: int, owner: object) -> torch.Tensor:
        return driver.at(at, size)

    install(monkeypatch, driver)
    monkeypatch.setattr(growing_memory, "is_available", lambda device: True)
    monkeypatch.setattr(
        growing_memory, "is_worth_it", lambda device, forgets: growing_memory.is_available(device)
    )
    monkeypatch.setattr(growing_memory, "block_of", lambda device: BLOCK)
    monkeypatch.setattr(
        growing_memory, "HostMemory", lambda block, sizes: Mapped(torch.device("cpu"), sizes)
    )
    monkeypatch.setattr(mapped_memory, "index_of", lambda device: 0)
    monkeypatch.setattr(Mapped, "tensor", tensor)
    regions.takes_less_by_head.cache_clear()
    return driver
