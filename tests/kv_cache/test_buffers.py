"""The pool of buffers under threads and finalizers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adaskip_fx.kv_cache.buffers import Slot, Storage, StoragePool

SLOTS = (Slot(1, 2, 1, 2),)
CPU = torch.device("cpu")


def lease(pool: StoragePool) -> Storage:
    return pool.lease(SLOTS, 1, 8, torch.float32, CPU)


class Yielding(StoragePool):
    """As the pool once was: reads what is kept, then forgets it; `between` runs in between."""

    def __init__(self, keep: bool, between: Any) -> None:
        super().__init__(keep)
        self.between = between

    def _taken(self) -> Storage | None:
        kept = self.idle
        self.between()
        self._kept.clear()
        return kept


def two_at_once(pool: StoragePool) -> list[Storage]:
    """Two threads lease while one storage is kept."""
    pool.give_back(Storage.zeros(SLOTS, 1, 8, torch.float32, CPU))
    leased: list[Storage] = []
    threads = [threading.Thread(target=lambda: leased.append(lease(pool))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return leased


def test_two_threads_are_not_given_the_same_buffers() -> None:
    a, b = two_at_once(StoragePool(keep=True))
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
    pool, held, shared = StoragePool(keep=True), set[int](), list[int]()

    def work() -> None:
        for _ in range(60):
            storage = lease(pool)
            if id(storage) in held:
                shared.append(id(storage))
            held.add(id(storage))
            held.discard(id(storage))
            pool.give_back(storage)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not shared


def test_a_finalizer_may_give_back_while_a_lease_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a collection of garbage does in the middle of an allocation; a lock would wait here."""
    pool = StoragePool(keep=True)
    ended = lease(pool)
    zeros = Storage.zeros

    def collecting(*args: Any) -> Storage:
        pool.give_back(ended)
        return zeros(*args)

    monkeypatch.setattr(Storage, "zeros", collecting)
    made = lease(pool)
    assert made is not ended
    assert lease(pool) is ended


def test_one_storage_is_kept() -> None:
    pool = StoragePool(keep=True)
    a, b = lease(pool), lease(pool)
    assert pool.idle is None
    assert not pool.idle_bytes
    pool.give_back(a)
    pool.give_back(b)
    assert pool.idle is b
    assert pool.idle_bytes == b.nbytes
    keys = b.keys[0]
    assert keys is not None
    keys.fill_(1.0)
    assert lease(pool) is b
    assert not keys.any(), "it is clean"
    pool.give_back(b)
    pool.clear()
    assert not pool.idle_bytes
    assert lease(pool) is not b


def test_what_was_shown_is_not_kept() -> None:
    pool = StoragePool(keep=True)
    storage = lease(pool)
    storage.shown = True
    pool.give_back(storage)
    assert lease(pool) is not storage
    assert not storage.copy().shown


def test_a_copy_made_in_inference_mode_can_be_written_outside_of_it() -> None:
    with torch.inference_mode():
        twin = lease(StoragePool(keep=False)).copy()
    keys = twin.keys[0]
    assert keys is not None
    assert not keys.is_inference()
    keys.fill_(1.0)
