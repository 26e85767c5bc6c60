"""Memory of the CPU that can be let go: pages go back, addresses stay."""

from __future__ import annotations

import gc
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adaskip_fx.kv_cache import growing_memory, host_memory
from adaskip_fx.kv_cache.buffer_pool import BufferPool
from adaskip_fx.kv_cache.buffers import CacheBuffers
from adaskip_fx.kv_cache.growing_memory import GrowingMemory
from adaskip_fx.kv_cache.layer_spec import LayerCacheSpec
from adaskip_fx.kv_cache.retention import SPARE, Retained, Retention

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory that only Linux lets go")

CPU, PAGE, MIB = torch.device("cpu"), mmap.PAGESIZE, 2**20
SPECS = (LayerCacheSpec(4, 64, 4, 64),) * 2
SEEN = Retained(4, 512)


@pytest.fixture(autouse=True)
def free_addresses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also where the tests run with a limit."""
    monkeypatch.setattr(growing_memory, "is_available", lambda device: True)
    yield
    gc.collect()


def resident() -> int:
    """Bytes of memory that the process has, by the system's own count."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_what_is_let_go_is_the_systems_again() -> None:
    memory = GrowingMemory(CPU, [256 * MIB, 64 * MIB])
    assert not memory.nbytes
    memory.extend(0, 48 * MIB, [PAGE, 40 * MIB])
    memory.fit([0, MIB])
    numbers, before = memory.tensor(0), resident()
    numbers[: 48 * MIB] = 7
    assert memory.nbytes == 49 * MIB
    assert resident() - before > 40 * MIB
    memory.let_go([(0, 3, 40 * MIB + 5)])
    assert memory.nbytes == 9 * MIB + PAGE
    assert resident() - before < 20 * MIB
    assert numbers[:PAGE].eq(7).all()
    assert not numbers[PAGE : 40 * MIB].any(), "it reads as zeros"
    assert numbers[40 * MIB : 48 * MIB].eq(7).all()
    del memory
    gc.collect()
    assert numbers[0] == 7, "a tensor holds its memory"


def filled(buffers: CacheBuffers, counts: list[int]) -> None:
    """Store tokens that are their own numbers, so many at a time, as a request does."""
    length = 0
    for count in counts:
        total = length + count
        if total > buffers.sliding.reached:
            buffers.sliding.slide(length, total)
        for stored in (*buffers.keys, *buffers.values):
            assert stored is not None
            numbers = torch.arange(length, total, dtype=stored.dtype).view(1, 1, -1, 1)
            stored.narrow(2, length, count).copy_(numbers.expand(1, 4, -1, 64))
        length = total


@pytest.mark.parametrize(
    ("retention", "by_head", "full"),
    [
        (((SEEN,) * 4, (SEEN,) * 4), False, 0),
        (((SEEN, None, SEEN, None), ()), True, 6),
        (((None, SEEN, SEEN, SEEN), (SEEN,) * 4), True, 1),
    ],
    ids=["whole layers", "half of a layer", "all heads but one"],
)
def test_bytes_are_what_windows_promise(retention: Retention, by_head: bool, full: int) -> None:
    """Sinks, the window and what can be taken back; of the heads that see all everything."""
    tokens, pool = 12000, BufferPool(False, 20000)
    before = resident()
    buffers = pool.acquire(SPECS, 1, tokens, torch.float32, CPU, retention)
    filled(buffers, [*[1000] * 11, 990, *[1] * 10])
    assert buffers.by_head == by_head
    head = 2 * 64 * 4  # bytes of a token's keys and values
    seen = SEEN.first + SEEN.last + SPARE
    held = full * buffers.capacity + (8 - full) * seen
    # the last chunk, which came before windows moved on; a piece is an eighth of a window
    slack = (8 - full) * (SEEN.last // 8 + 2) * head + 8 * 2 * 3 * PAGE
    assert held * head <= buffers.nbytes <= held * head + slack
    assert resident() - before < buffers.nbytes + 4 * MIB
    for layer, heads in enumerate(retention):
        for index, kept in enumerate(heads or (None,) * 4):
            last = tokens - (SEEN.last if kept else tokens)
            for stored in (buffers.keys[layer], buffers.values[layer]):
                assert stored is not None
                shown = stored[0, index, :, 0]
                assert torch.equal(shown[last:tokens], torch.arange(last, tokens).float())
                assert torch.equal(shown[: SEEN.first], torch.arange(SEEN.first).float())


@pytest.mark.breaks
def test_without_memory_that_can_be_let_go_all_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_memory, "is_available", lambda device: False)
    retention = (SEEN, None, SEEN, None), ()
    buffers = BufferPool(False, 20000).acquire(SPECS, 1, 12000, torch.float32, CPU, retention)
    filled(buffers, [11990, *[1] * 10])
    assert not buffers.by_head
    assert buffers.nbytes == 2 * 12000 * 2 * 256 * 4


def test_a_plan_without_windows_has_pytorchs_memory() -> None:
    buffers = BufferPool(False, 20000).acquire(SPECS, 1, 100, torch.float32, CPU)
    assert buffers.memory is None


def test_where_addresses_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    def found(policy: str | None, limit: int, platform: str = "linux") -> bool:
        path = tmp_path / "overcommit"
        path.unlink(missing_ok=True)
        if policy is not None:
            path.write_text(f"{policy}\n")
        with monkeypatch.context() as patch:
            patch.setattr(host_memory, "_OVERCOMMIT", path)
            patch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
            patch.setattr(sys, "platform", platform)
            host_memory.has_free_addresses.cache_clear()
            answer = host_memory.has_free_addresses()
        host_memory.has_free_addresses.cache_clear()
        return answer

    none = resource.RLIM_INFINITY
    assert found("0", none)
    assert found("1", none)
    assert not found("2", none)
    assert not found(None, none)
    assert not found("0", 2**40)
    assert not found("0", none, "darwin")
