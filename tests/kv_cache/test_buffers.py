"""The pool of buffers under threads and finalizers."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.kv_cache.buffer_pool import BufferLease, BufferPool
from adaskip_fx.kv_cache.buffers import CacheBuffers
from adaskip_fx.kv_cache.layer_spec import LayerCacheSpec, State
from adaskip_fx.utils.memory_budget import MemoryBudget
from tests.support.cuda_driver import Driver, install_on_cpu

SPECS = (LayerCacheSpec(1, 2, 1, 2, (State("conv", 0, (3,), torch.float32),)),)
CPU = torch.device("cpu")


def acquire(pool: BufferPool) -> CacheBuffers:
    return pool.acquire(SPECS, 1, 8, torch.float32, CPU)


class Yielding(BufferPool):
    """As the pool once was: reads what is kept, then forgets it; `between` runs in between."""

    def __init__(self, keep: bool, between: Any) -> None:
        super().__init__(keep)
        self.between = between

    def _take(self, buffers: CacheBuffers) -> bool:
        there = buffers in self.idle
        self.between()
        self._kept.clear()
        return there


def two_at_once(pool: BufferPool) -> list[CacheBuffers]:
    """Two threads lease while one buffers is kept."""
    pool.release(CacheBuffers.new(SPECS, 1, 8, torch.float32, CPU))
    leased: list[CacheBuffers] = []
    threads = [threading.Thread(target=lambda: leased.append(acquire(pool))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return leased


def test_two_threads_are_not_given_the_same_buffers() -> None:
    a, b = two_at_once(BufferPool(keep=True))
    assert a is not b


def test_read_and_forget_one_after_the_other_gives_both_the_same() -> None:
    """The companion: what a pool without single operations does when threads meet."""
    a, b = two_at_once(Yielding(True, threading.Barrier(2, timeout=30).wait))
    assert a is b


@pytest.fixture
def _often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_often")
def test_many_threads() -> None:
    """What is leased belongs to one thread until it gives it back."""
    pool, held, shared = BufferPool(keep=True), set[int](), list[int]()

    def work() -> None:
        for _ in range(60):
            buffers = acquire(pool)
            if id(buffers) in held:
                shared.append(id(buffers))
            held.add(id(buffers))
            held.discard(id(buffers))
            pool.release(buffers)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not shared


def test_a_finalizer_may_give_back_while_a_lease_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a collection of garbage does in the middle of an allocation; a lock would wait here."""
    pool = BufferPool(keep=True)
    ended = acquire(pool)
    new = CacheBuffers.new

    def collecting(*args: Any) -> CacheBuffers:
        pool.release(ended)
        return new(*args)

    monkeypatch.setattr(CacheBuffers, "new", collecting)
    made = acquire(pool)
    assert made is not ended
    assert acquire(pool) is ended


def test_as_many_buffers_are_kept_as_the_budget_allows() -> None:
    nbytes = acquire(BufferPool(keep=False)).nbytes
    pool = BufferPool(keep=True, budget=MemoryBudget(3 * nbytes - 1))
    a, b, c = (acquire(pool) for _ in "abc")
    assert pool.idle == []
    assert not pool.idle_bytes
    pool.release(a)
    pool.release(b)
    assert pool.idle == [a, b]
    pool.release(c)
    assert pool.idle == [b, c]
    assert pool.idle_bytes == 2 * nbytes
    assert acquire(pool) is c
    b.states[0][0].fill_(1.0)
    assert acquire(pool) is b
    assert not b.states[0][0].any(), "it is clean"
    pool.release(b)
    pool.clear()
    assert not pool.idle_bytes
    assert acquire(pool) is not b


def test_what_is_kept_goes_before_there_is_too_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, new, rows = BufferPool(keep=True), CacheBuffers.new, list[int]()
    for buffers in [acquire(pool) for _ in range(2)]:
        pool.release(buffers)
    del buffers

    def within(*args: Any) -> CacheBuffers:
        rows.append(args[1])
        gc.collect()
        if args[1] > 2 - len(pool.idle):
            raise torch.OutOfMemoryError("no room")
        return new(*args)

    monkeypatch.setattr(CacheBuffers, "new", within)
    form = torch.float32, CPU
    assert pool.acquire(SPECS, 2, 8, *form).batch == 2
    assert rows == [2, 2]
    assert pool.idle == []
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        pool.acquire(SPECS, 3, 8, *form)
    assert rows == [2, 2, 3], "there is nothing more to free"


def test_buffers_of_other_requests_stay() -> None:
    """Of another batch, they are used when one like theirs comes again."""
    pool = BufferPool(keep=True)
    one = acquire(pool)
    pool.release(one)
    two = pool.acquire(SPECS, 2, 8, torch.float32, CPU)
    pool.release(two)
    assert pool.idle == [one, two]
    assert acquire(pool) is one
    assert pool.acquire(SPECS, 2, 64, torch.float32, CPU) is not two
    assert pool.idle == [], "what is of the kind and has too little room is freed"


def test_what_was_shown_is_not_kept() -> None:
    pool = BufferPool(keep=True)
    buffers = acquire(pool)
    buffers.shown = True
    pool.release(buffers)
    assert acquire(pool) is not buffers


def test_buffers_made_in_inference_mode_can_be_written_outside_of_it() -> None:
    with torch.inference_mode():
        twin = acquire(BufferPool(keep=False))
    keys = twin.keys[0]
    assert keys is not None
    assert not keys.is_inference()
    keys.fill_(1.0)


def test_a_lease_gives_its_buffers_back_when_it_is_gone() -> None:
    pool = BufferPool(keep=True)
    lease, buffers = BufferLease(pool), acquire(pool)
    lease.hold(buffers)
    assert pool.idle == []
    del lease
    assert pool.idle == [buffers]


def test_a_lease_gives_back_what_it_held_before() -> None:
    pool = BufferPool(keep=True)
    lease, before, after = BufferLease(pool), acquire(pool), acquire(pool)
    lease.hold(before)
    lease.hold(after)
    assert lease.buffers is after
    assert pool.idle == [before]
    lease.release()
    assert lease.buffers is None
    assert pool.idle == [before, after]
    pool.clear()
    lease.release()
    assert pool.idle == [], "it gives nothing back twice"


# What a request costs after another one --------------------------------------------------------

ROOM = 4096
LENGTHS = st.lists(st.integers(1, ROOM), min_size=1, max_size=5)


def bytes_of(pool: BufferPool, tokens: int) -> int:
    """Bytes that a request of so many tokens has, which ends."""
    form = [LayerCacheSpec(1, 4, 1, 4)] * 2, 1, tokens, torch.float32, torch.device("cpu")
    buffers = pool.acquire(*form)
    pool.release(buffers)
    return buffers.nbytes


@given(LENGTHS)
def test_a_request_costs_no_more_after_a_long_one(lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        driver = install_on_cpu(patch, Driver())
        pool = BufferPool(keep=True, longest=ROOM)
        for tokens in (*lengths, 1, ROOM, 1):
            alone = bytes_of(BufferPool(keep=False, longest=ROOM), tokens)
            gc.collect()
            held = bytes_of(pool, tokens)
            assert held == alone == sum(driver.handles.values()), f"of {tokens} tokens"
        kept = pool.idle
        assert bytes_of(pool, ROOM) > held
        assert pool.idle == kept, "its addresses stay, with what was recorded at them"
        del kept
        pool.clear()
        gc.collect()
        assert not driver.handles


@given(LENGTHS)
def test_where_memory_does_not_grow_it_costs_at_most_twice_as_much(lengths: list[int]) -> None:
    pool = BufferPool(keep=True, longest=ROOM)
    for tokens in (*lengths, 1, ROOM, 1):
        alone = bytes_of(BufferPool(keep=False, longest=ROOM), tokens)
        assert alone <= bytes_of(pool, tokens) <= 2 * alone, f"of {tokens} tokens"
