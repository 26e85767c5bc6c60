"""What is asked of the driver for memory that grows in place; `tests/gpu` has a real one."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.kv_cache import growing_memory
from adaskip_fx.kv_cache.buffers import CacheBuffers
from adaskip_fx.kv_cache.growing_memory import GrowingMemory
from adaskip_fx.kv_cache.layer_spec import LayerCacheSpec
from adaskip_fx.kv_cache.retention import Part
from tests.support.cuda_driver import BLOCK, Driver, install, install_on_cpu

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test made goes while its driver is there."""
    yield
    gc.collect()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return install(monkeypatch, Driver())


SIZES = st.lists(st.integers(0, 900), min_size=3, max_size=3)


@given(st.lists(st.tuples(st.sampled_from(["fit", "some", "trim"]), SIZES), max_size=8))
def test_memory_is_behind_the_beginning_of_each_range(steps: list[tuple[str, list[int]]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        driver = install(patch, Driver())
        memory = GrowingMemory(DEVICE, [1000, 1000, 1000])  # never full: ranges touch
        wanted = [0, 0, 0]
        for kind, needed in steps:
            if kind == "trim":
                memory.trim(needed)
                wanted = list(needed)
            else:
                if kind == "some":
                    memory.fit(needed, most=1)
                memory.fit(needed)
                wanted = [max(pair) for pair in zip(wanted, needed, strict=True)]
            rounded = [-(-n // BLOCK) * BLOCK for n in wanted]
            assert memory.filled == rounded
            assert [driver.behind(memory.address(i)) for i in range(3)] == rounded
            assert memory.nbytes == sum(driver.handles.values()) == sum(rounded)
        del memory
        gc.collect()
        assert not driver.handles
        assert not driver.reserved


def test_some_ranges_at_a_time(driver: Driver) -> None:
    memory = GrowingMemory(DEVICE, [640] * 5)
    held = []
    for _ in range(3):
        memory.fit([100] * 5, most=2)
        held.append(memory.nbytes // (2 * BLOCK))
    assert held == [2, 4, 5]


def test_no_room_is_an_error_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install(monkeypatch, Driver(room=5 * BLOCK))
    memory = GrowingMemory(DEVICE, [10 * BLOCK])
    memory.fit([4 * BLOCK])
    with pytest.raises(torch.OutOfMemoryError, match="no room for more keys and values"):
        memory.fit([7 * BLOCK])
    assert driver.behind(memory.address(0)) == 4 * BLOCK, "what there was is there"


def test_memory_of_others_comes_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody can reach waits while a graph is captured; it is there when it is needed."""
    driver = install(monkeypatch, Driver(room=5 * BLOCK))
    other = GrowingMemory(DEVICE, [4 * BLOCK])
    other.fit([4 * BLOCK])
    memory = GrowingMemory(DEVICE, [4 * BLOCK])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    del other
    gc.collect()
    assert len(driver.reserved) == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    memory.fit([4 * BLOCK])
    assert len(driver.reserved) == 1


def test_where_it_is_available(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, maps, expected in (("13.0", 1, True), ("13.0", 0, False), (None, 1, False)):
        growing_memory.is_available.cache_clear()
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(driver, "cuDeviceGetAttribute", lambda *_, maps=maps: (0, maps))
        assert growing_memory.is_available(DEVICE) is expected
    growing_memory.is_available.cache_clear()
    assert not growing_memory.is_available(torch.device("xpu"))
    monkeypatch.setattr(growing_memory, "bindings", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert not growing_memory.is_available(DEVICE)
    growing_memory.is_available.cache_clear()


def test_other_errors_are_named(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "cuMemMap", lambda *_: (801,))
    with pytest.raises(RuntimeError, match="cuMemMap failed: 801"):
        GrowingMemory(DEVICE, [BLOCK]).fit([BLOCK])


@pytest.mark.parametrize("name", ["cuMemMap", "cuMemSetAccess"])
def test_memory_that_cannot_be_mapped_goes_back(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    memory = GrowingMemory(DEVICE, [1000])
    memory.fit([100])
    held = dict(driver.handles)
    with monkeypatch.context() as patch:
        patch.setattr(driver, name, lambda *_: (7,))
        with pytest.raises(RuntimeError, match=f"{name} failed: 7"):
            memory.fit([500])
    assert driver.handles == held
    assert memory.nbytes == sum(held.values())
    memory.fit([500])
    assert driver.behind(memory.address(0)) == 512


def test_buffers_without_room_to_begin_anew_say_what_they_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = install_on_cpu(monkeypatch, Driver())
    specs = [LayerCacheSpec(2, 8, 2, 8)]
    cpu = torch.device("cpu")
    buffers = CacheBuffers.new(specs, 1, 400, torch.float32, cpu, longest=1000)
    buffers.sliding.forget(
        {Part(0, 0, 2): range(100, 200)}
    )  # a gap, so that all of it is mapped anew
    driver.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        buffers.fit_anew(50, ())
    assert buffers.capacity * 2 * 8 * 4 <= driver.behind(buffers.memory.address(0))  # type: ignore[union-attr]
    del buffers
    gc.collect()
