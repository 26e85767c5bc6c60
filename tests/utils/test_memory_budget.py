"""One budget of bytes: what was used last stays, and nothing but what runs is beyond it."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.utils import memory_budget
from adaskip_fx.utils.memory_budget import KINDS, Kind, MemoryBudget, default_budget

MEMORY = Path("/proc/meminfo")
#: Kinds that a step runs on, of which the one that was used last is never let go.
RUN = ("graphs", "programs", "recordings")


class Thing:
    """What somebody keeps: parts of so many bytes by name."""

    def __init__(self, kind: Kind, **parts: int) -> None:
        self.kind, self.sizes = kind, {hash(name): size for name, size in parts.items()}

    def parts(self) -> dict[int, int]:
        return self.sizes


class Owner:
    """Keeps things in the order in which they were used, the last one last."""

    def __init__(self, limit: int) -> None:
        self.budget = MemoryBudget(limit)
        self.order: list[Thing] = []

    def keep(self, thing: Thing, pinned: bool = False) -> Thing:
        self.order.append(thing)
        self.budget.keep(thing, thing.kind, None if pinned else self.order.remove)
        return thing

    def use(self, thing: Thing) -> None:
        self.order.remove(thing)
        self.order.append(thing)
        self.budget.use(thing)

    @property
    def nbytes(self) -> int:
        every: dict[int, int] = {}
        for thing in self.order:
            every |= thing.sizes
        return sum(every.values())


def names(owner: Owner, **things: Thing) -> str:
    return "".join(name for name, thing in things.items() if thing in owner.order)


def test_what_was_not_used_for_the_longest_time_goes() -> None:
    owner = Owner(10)
    a, b, c = (owner.keep(Thing("programs", **{name: 4})) for name in "abc")
    assert names(owner, a=a, b=b, c=c) == "bc"
    owner.use(b)
    d = owner.keep(Thing("programs", d=4))
    assert names(owner, b=b, c=c, d=d) == "bd"
    owner.budget.limit = 4
    assert names(owner, b=b, d=d) == "d"


def test_what_does_not_fit_makes_no_room_for_itself() -> None:
    owner = Owner(10)
    a = owner.keep(Thing("buffers", a=4))
    b = owner.keep(Thing("buffers", b=11))
    assert names(owner, a=a, b=b) == "a"


def test_graphs_and_programs_come_first() -> None:
    """They take seconds to be made again."""
    owner = Owner(10)
    a = owner.keep(Thing("graphs", a=4))
    b = owner.keep(Thing("buffers", b=4))
    c = owner.keep(Thing("recordings", c=2))
    d = owner.keep(Thing("programs", d=4))
    assert names(owner, a=a, b=b, c=c, d=d) == "acd"


def test_what_two_share_counts_once() -> None:
    owner = Owner(10)
    graph = owner.keep(Thing("graphs", graph=4))
    one, two = (owner.keep(Thing("programs", graph=4, map=3, **{n: 1})) for n in ("one", "two"))
    assert owner.order == [graph, one, two]
    assert owner.budget.held() == {
        **dict.fromkeys(KINDS, (0, 0)),
        "graphs": (1, 4),
        "programs": (2, 5),
    }
    owner.keep(Thing("programs", other=3))
    assert one not in owner.order
    assert graph in owner.order, "a program of it is kept"


def test_what_a_step_runs_on_stays_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    owner = Owner(1)
    with caplog.at_level(logging.WARNING):
        first = owner.keep(Thing("graphs", first=3), pinned=True)
        for name in "ab":
            graph = owner.keep(Thing("graphs", **{name: 5}))
            program = owner.keep(Thing("programs", **{name: 5, f"{name} itself": 2}))
            owner.keep(Thing("buffers", x=1))
            recording = owner.keep(Thing("recordings", **{f"{name} recorded": 7}))
            assert owner.order == [first, graph, program, recording]
    assert [record.getMessage() for record in caplog.records] == [
        "the memory budget of 1 bytes is less than the 3 that the last step ran on: nothing else "
        "is kept, and what other steps need is made again, in seconds; give a larger memory_budget"
    ]


def test_what_its_owner_has_forgotten_counts_no_more() -> None:
    owner = Owner(10)
    a = owner.keep(Thing("buffers", a=8))
    owner.order.clear()
    del a
    gc.collect()
    b, c = owner.keep(Thing("buffers", b=8)), Thing("buffers", c=8)
    assert owner.order == [b]
    owner.budget.forget(b)
    owner.keep(c)
    assert owner.order == [b, c], "it is somebody else's now"
    assert owner.budget.use(c)
    assert not owner.budget.use(b)
    assert owner.budget.held()["buffers"] == (1, 8)


@pytest.mark.parametrize("limit", [0, -1, 1.5, "1 GiB", True, None])
def test_what_is_no_budget(limit: Any) -> None:
    with pytest.raises(ValueError, match=r"memory_budget must be a whole number of bytes, got "):
        MemoryBudget(limit)


@pytest.mark.skipif(not MEMORY.exists(), reason="the system has no such table")
def test_the_default_is_an_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    total = int(MEMORY.read_text().split()[1]) * 1024
    assert default_budget(torch.device("cpu")) == pytest.approx(total / 8, rel=0.02)
    monkeypatch.delattr(os, "sysconf")
    assert default_budget(torch.device("cpu")) == 2 * 2**30
    device = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert default_budget(torch.device("cuda")) == 10 * 2**30


# Whatever comes --------------------------------------------------------------------------------

SIZES = st.integers(1, 8)
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("keep"), st.sampled_from(KINDS), SIZES, st.booleans()),
        st.tuples(st.just("use"), st.integers(0, 30)),
        st.tuples(st.just("limit"), st.integers(1, 40)),
    ),
    max_size=25,
)


def follow(calls: list[Any], limit: int) -> Iterator[tuple[Owner, list[Thing], int]]:
    """Yield an owner after each call, what was kept right before it let go, and the limit."""
    owner = Owner(limit)
    for number, (what, *rest) in enumerate(calls):
        before = list(owner.order)
        if what == "keep":
            kind, size, shares = rest
            extra = {"shared": 5} if shares and kind == "programs" else {}
            before.append(owner.keep(Thing(kind, **{f"part {number}": size}, **extra)))
        elif what == "limit":
            owner.budget.limit = limit = rest[0]
        elif owner.order:
            owner.use(owner.order[rest[0] % len(owner.order)])
            before = list(owner.order)
        yield owner, before, limit


def beyond(owner: Owner, limit: int) -> bool:
    """Whether more is kept than the budget allows, besides what runs."""
    last = {thing.kind: thing for thing in owner.order if thing.kind in RUN}
    running: dict[int, int] = {}
    for thing in last.values():
        running |= thing.sizes
    return owner.nbytes > max(limit, sum(running.values()))


def check(calls: list[Any], limit: int) -> None:
    for owner, before, allowed in follow(calls, limit):
        assert not beyond(owner, allowed)
        together: dict[int, int] = {}
        for thing in before:
            together |= thing.sizes
        if sum(together.values()) <= allowed:
            assert len(owner.order) == len(before), "what fits is kept"
        gone = [thing for thing in before if thing not in owner.order]
        stays = {kind: [t for t in owner.order if t.kind == kind] for kind in RUN}
        for thing in gone:
            if thing.kind in RUN:
                assert stays[thing.kind], "the last of its kind stays"
        counted = owner.budget.held()
        assert sum(size for _, size in counted.values()) == owner.nbytes
        assert sum(count for count, _ in counted.values()) == len(owner.order)


@given(CALLS, st.integers(1, 40))
def test_no_more_is_kept_than_the_budget_allows(calls: list[Any], limit: int) -> None:
    check(calls, limit)


@pytest.mark.breaks
def test_without_letting_go_it_would_be_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    monkeypatch.setattr(MemoryBudget, "_settle", lambda self: None)
    with pytest.raises(AssertionError):
        check([("keep", "buffers", 4, False)] * 3, 10)


@pytest.mark.breaks
def test_counting_what_is_shared_twice_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        memory_budget, "_beside", lambda parts, kept: {object(): n for n in kept.parts().values()}
    )
    with pytest.raises(AssertionError):
        check([("keep", "programs", 1, True)] * 3, 12)


# Threads and finalizers ------------------------------------------------------------------------


class Returned:
    """Something that is kept by a finalizer, in the middle of what lets it be."""

    def __init__(self, finish: Callable[[], object]) -> None:
        self.finish = finish

    def __del__(self) -> None:
        self.finish()


def test_a_finalizer_may_keep_something_while_something_is_let_go() -> None:
    owner = Owner(10)
    late = Thing("buffers", late=6)
    a = Thing("buffers", a=6)

    def let_go(thing: Thing) -> None:
        owner.order.remove(thing)
        Returned(lambda: owner.keep(late))

    owner.order.append(a)
    owner.budget.keep(a, "buffers", let_go)
    b = owner.keep(Thing("buffers", b=6))
    assert owner.order == [late]
    assert b not in owner.order


def test_many_threads() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    budget, kept, failed = MemoryBudget(40), dict[int, Thing](), list[BaseException]()

    def let_go(thing: Thing) -> None:
        kept.pop(id(thing), None)

    def work(number: int) -> None:
        try:
            for turn in range(150):
                thing = Thing(KINDS[turn % 4], **{f"{number} {turn}": 3})
                kept[id(thing)] = thing
                budget.keep(thing, thing.kind, let_go)
                budget.use(thing)
                budget.held()
        except BaseException as error:
            failed.append(error)

    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed
    assert sum(sum(t.sizes.values()) for t in kept.values()) <= 40
    assert sum(size for _, size in budget.held().values()) <= 40
