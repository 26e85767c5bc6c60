"""What a rank concludes of the others, from what they write to a store, without processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch.distributed as dist

from adaskip_fx.parallel import watch
from adaskip_fx.parallel.errors import RanksError
from adaskip_fx.parallel.watch import Watch


class Store:
    """A store that both ranks have, in this process."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.held[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.held[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.held for key in keys)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watch.time, "monotonic", made)
    return made


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> tuple[Watch, Watch]:
    """Two ranks that look when a test says so."""
    store = Store()
    monkeypatch.setattr(watch, "store_of_processes", lambda group, members: store)
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    group = cast(dist.ProcessGroup, None)
    return Watch(group, (0, 1), 0), Watch(group, (0, 1), 1)


def looks(one: Watch, clock: Clock, seconds: float = 60, meanwhile: Callable[[], Any] = str) -> Any:
    """What a rank finds, looking once a second."""
    for _ in range(int(seconds)):
        found = one._look()
        if found is not None:
            return found
        clock.now += 1
        meanwhile()
    return None


def test_a_step_that_fails_on_both_ranks_is_no_news(
    ranks: tuple[Watch, Watch], clock: Clock
) -> None:
    for one in ranks:
        one.enter()
        one.leave(ValueError("too long"))
    for one in ranks:
        assert looks(one, clock) is None
        one.enter()
        one.leave(None)
        assert looks(one, clock) is None


def test_a_rank_that_waits_in_a_step_that_another_left_is_told_after_a_while(
    ranks: tuple[Watch, Watch], clock: Clock
) -> None:
    first, second = ranks
    for one in ranks:
        one.enter()
    second.leave(ValueError("here alone"))
    began = clock.now
    assert looks(first, clock) == (
        "rank 1 of this model failed, and the others cannot go on: ValueError: here alone"
    )
    assert 8 < clock.now - began < 12  # it may have failed in the same way, a little later
    assert looks(second, clock) is None


def test_a_rank_that_went_on_where_another_failed_is_told_soon(
    ranks: tuple[Watch, Watch], clock: Clock
) -> None:
    first, second = ranks
    for one in ranks:
        one.enter()
    first.leave(None)  # what it has launched waits on its device
    second.leave(ValueError("here alone"))
    began = clock.now
    assert "ValueError: here alone" in looks(first, clock)
    assert clock.now - began < 5


def test_a_failure_that_all_have_heard_of_is_taken_back(
    ranks: tuple[Watch, Watch], clock: Clock
) -> None:
    first, second = ranks
    for one in ranks:
        one.enter()
    second.failed(ValueError("a graph that is not traced"))
    second.recovered()
    assert looks(first, clock) is None


def test_a_step_within_another_is_a_part_of_it(ranks: tuple[Watch, Watch], clock: Clock) -> None:
    first, second = ranks
    for one in ranks:
        one.enter()
        one.enter()
    second.leave(ValueError("caught outside"))
    second.leave(None)
    first.leave(None)
    first.leave(None)
    assert looks(first, clock) is None


def test_a_rank_that_does_not_count_any_more_is_gone(
    ranks: tuple[Watch, Watch], clock: Clock
) -> None:
    first, second = ranks
    counted = iter(range(10))
    second._set("count", "-1")

    def count() -> None:
        number = next(counted, None)
        if number is not None:
            second._set("count", str(number))

    began = clock.now
    assert looks(first, clock, meanwhile=count) == (
        "rank 1 of this model is gone, or has stopped: nothing was heard of it for 20 s; start all "
        "ranks again"
    )
    assert 29 < clock.now - began < 34


def test_a_rank_that_has_ended_is_missed_by_one_that_waits_for_it(
    ranks: tuple[Watch, Watch], clock: Clock
) -> None:
    first, second = ranks
    second._set("left", "yes")
    assert looks(first, clock) is None
    first.enter()
    assert looks(first, clock) == (
        "rank 1 of this model is gone: it has ended, and this one goes on"
    )


def test_errors_of_connections_are_explained_by_what_the_other_said(
    ranks: tuple[Watch, Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ranks
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    for one in ranks:
        one.enter()
    second.leave(MemoryError("full"))
    lost = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:36062")
    with pytest.raises(RanksError, match=r"^rank 1 of this model failed.*MemoryError: full$"):
        first.leave(lost)
    first.enter()
    first.leave(ValueError("of its own"))  # raised by whoever calls, as it is
    assert json.loads(first._store.get("failed/0")) == [2, "ValueError: of its own"]


def test_without_a_word_of_the_others_the_connection_is_told(
    ranks: tuple[Watch, Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = ranks
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    first.enter()
    told = r"gone: it was killed, or has ended \(Connection closed by peer\); start all ranks again"
    with pytest.raises(RanksError, match=told):
        first.leave(RuntimeError("[pair.cc:553] Connection closed by peer"))
    with pytest.raises(RanksError, match=told):  # from now on
        first.enter()
