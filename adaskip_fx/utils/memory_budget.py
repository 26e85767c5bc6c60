"""One budget of bytes for what a compiled model keeps for later: what was used last stays.

Who makes something to be used again keeps it, and says so here. When all of it takes more than the
budget, its owners are asked to let go of what does not fit beside what was used after it. Nothing
is owned here, so what an owner forgets by itself counts no more.

Graphs and programs come before recordings and buffers: they take seconds to be made again, where
those take milliseconds. It also makes what is kept of them depend on nothing but the steps that
were run, so that ranks that run the same steps keep the same.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch

logger = logging.getLogger(__name__)

Kind = Literal["graphs", "programs", "recordings", "buffers"]

#: In the order in which memory that two share is counted as the one's or the other's.
KINDS: tuple[Kind, ...] = ("graphs", "programs", "recordings", "buffers")
#: What a step runs on, besides the buffers that its request holds.
_RUN: tuple[Kind, ...] = ("graphs", "programs", "recordings")
_SLOW: tuple[Kind, ...] = ("graphs", "programs")
#: The part of a device's memory that is the budget where none is given.
SHARE = 8
_ANYWHERE = 16 * 2**30  # bytes of memory, where nothing says how many there are


class Kept(Protocol):
    """What somebody keeps; it can be referred to weakly."""

    def parts(self) -> Mapping[int, int]:
        """Return the bytes of each part, by the identity of that: what two share counts once."""


KeptT = TypeVar("KeptT", bound=Kept)


@dataclass(eq=False)
class _Entry:
    kind: Kind
    let_go: Callable[..., None] | None
    used: int


class MemoryBudget:
    """What is kept, and how many bytes that may take.

    Whoever changes something has what does not fit let go, one thread at a time: one that comes
    while another is at it leaves it to that one. So nobody waits, not even a finalizer that runs
    in the middle of it.
    """

    def __init__(self, limit: int = 2**63) -> None:
        """Keep nothing yet.

        Args:
            limit: Bytes.

        Raises:
            ValueError: It is no positive number of bytes.
        """
        self._limit = checked_budget(limit)
        self._entries: WeakKeyDictionary[Kept, _Entry] = WeakKeyDictionary()
        self._clock = itertools.count()
        self._turn = threading.Lock()
        self._due = self._said = False

    @property
    def limit(self) -> int:
        """Bytes that may be kept; of a smaller number that is set, more is let go at once."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit, self._said = checked_budget(limit), False
        self._settle()

    def keep(self, kept: KeptT, kind: Kind, let_go: Callable[[KeptT], None] | None) -> None:
        """Count what its owner keeps from now on, as used just now.

        Args:
            kept: It counts for as long as somebody holds it, or until `forget`.
            kind: What it is.
            let_go: Has the owner forget it, in any thread and at any time; None if it never does.
        """
        self._entries[kept] = _Entry(kind, let_go, next(self._clock))
        self._settle()

    def use(self, kept: Kept) -> bool:
        """Say that a step uses something now; returns whether it is kept."""
        entry = self._entries.get(kept)
        if entry is None:
            return False
        entry.used = next(self._clock)
        return True

    def forget(self, kept: Kept) -> None:
        """Count something no more: its owner does not keep it for later now."""
        self._entries.pop(kept, None)

    def held(self) -> dict[Kind, tuple[int, int]]:
        """Return how many of each kind are kept, and their bytes."""
        counts, sizes = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        parts = dict[int, int]()
        for kept, entry in sorted(self._all(), key=lambda item: KINDS.index(item[1].kind)):
            counts[entry.kind] += 1
            more = _beside(parts, kept)
            sizes[entry.kind] += sum(more.values())
            parts |= more
        return {kind: (counts[kind], sizes[kind]) for kind in KINDS}

    def _all(self) -> list[tuple[Kept, _Entry]]:
        while True:
            with suppress(RuntimeError):  # another thread has changed it meanwhile
                return list(self._entries.items())

    def _settle(self) -> None:
        """Have what does not fit let go; if that is being done, it is done once more."""
        self._due = True
        while self._due and self._turn.acquire(blocking=False):
            try:
                self._due = False
                self._let_go(self._all())
            finally:
                self._turn.release()

    def _let_go(self, entries: list[tuple[Kept, _Entry]]) -> None:
        """Walk from what was used last to what was used first, and let go what does not fit."""
        entries.sort(key=lambda item: (item[1].kind not in _SLOW, -item[1].used))
        parts = dict[int, int]()
        running = {id(kept) for kept, _ in _running(entries)}
        for kept, _ in _running(entries):
            parts |= kept.parts()
        total = sum(parts.values())
        self._say_if_less(total)
        for kept, entry in entries:
            if id(kept) in running:
                continue
            more = _beside(parts, kept)
            if total + sum(more.values()) <= self._limit:
                parts |= more
                total += sum(more.values())
            else:
                self.forget(kept)
                assert entry.let_go is not None
                entry.let_go(kept)

    def _say_if_less(self, needed: int) -> None:
        if needed <= self._limit or self._said:
            return
        self._said = True
        logger.warning(
            "the memory budget of %s bytes is less than the %s that the last step ran on: nothing "
            "else is kept, and what other steps need is made again, in seconds; give a larger "
            "memory_budget",
            f"{self._limit:,}",
            f"{needed:,}",
        )


def _running(entries: list[tuple[Kept, _Entry]]) -> Iterator[tuple[Kept, _Entry]]:
    """Yield what is never let go, and of what steps run on the last of each kind."""
    last = set[Kind]()
    for kept, entry in entries:
        if entry.let_go is None or (entry.kind in _RUN and entry.kind not in last):
            yield kept, entry
        last.add(entry.kind)


def _beside(parts: Mapping[int, int], kept: Kept) -> dict[int, int]:
    """Return what somebody keeps that is not among `parts`."""
    return {part: size for part, size in kept.parts().items() if part not in parts}


def checked_budget(limit: int) -> int:
    """Return a number of bytes.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"memory_budget must be a whole number of bytes, got {limit!r}")
    return limit


def default_budget(device: torch.device) -> int:
    """Return an eighth of a device's memory; of the main memory where it is no CUDA device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // SHARE
    try:
        main = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        main = _ANYWHERE
    return main // SHARE
