"""Buffers are leased to one request at a time, and kept for later ones within the memory budget.

A captured CUDA graph holds the addresses of the buffers it works on. Where graphs are recorded,
the buffers of a request that has ended are therefore kept for a later one, with the graphs that
were recorded on them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TypeAlias

import torch

from ..utils.memory_budget import MemoryBudget
from . import growing_memory
from .buffers import CacheBuffers
from .layer_spec import LayerCacheSpec
from .regions import takes_less_by_head
from .retention import Retention

_LONGEST = 2**20  # tokens, of a model without a limit

#: What a request asks for: the arguments of `BufferPool.acquire`.
_Form: TypeAlias = tuple[Sequence[LayerCacheSpec], int, int, torch.dtype, torch.device, Retention]


class BufferPool:
    """Makes buffers, and keeps those that came back if `keep` says so, within the memory budget.

    Requests of several threads acquire from one pool, and buffers come back in a finalizer: in any
    thread, in the middle of a collection of garbage, also of one that an allocation in `acquire`
    set off. A lock would wait for itself there. What is kept is therefore in a dictionary: no other
    thread and no finalizer can come between its single operations, and whoever takes buffers out of
    it has them.

    Attributes:
        keep: whether buffers are kept for later requests.
        longest: tokens that buffers may grow to in place, where a device can.
        whole: whether steps read all of a buffer, filled or not.
    """

    def __init__(
        self, keep: bool, longest: int | None = None, budget: MemoryBudget | None = None
    ) -> None:
        """Keep nothing yet; `budget` says what is kept in all, and is without end if None."""
        self.keep = keep
        self.longest = longest or _LONGEST
        self.whole = False
        self._budget = budget or MemoryBudget()
        self._kept: dict[int, CacheBuffers] = {}  # by identity, the last ones last

    @property
    def idle(self) -> list[CacheBuffers]:
        """The buffers that are kept for later requests, to be looked at; the last ones last."""
        return list(self._kept.values())

    @property
    def idle_bytes(self) -> int:
        """Bytes of the buffers that are kept for later requests."""
        return sum(buffers.nbytes for buffers in self.idle)

    def acquire(
        self,
        specs: Sequence[LayerCacheSpec],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        retention: Retention = (),
    ) -> CacheBuffers:
        """Return buffers with memory for `capacity` tokens or more; nobody else has them.

        Raises:
            torch.OutOfMemoryError: there is not enough, also without what was kept.
        """
        form = specs, batch, capacity, dtype, device, retention
        by_head = self.by_head(*form)
        while True:
            try:
                return self._again(form, by_head) or self._new(form, by_head)
            except torch.OutOfMemoryError:
                if not self._kept:
                    raise
            self.clear()  # (here nothing of what has failed is held any more)

    def _again(self, form: _Form, by_head: bool) -> CacheBuffers | None:
        """Return buffers of another request; those of its kind with too little room are freed."""
        specs, batch, capacity, dtype, device, retention = form
        wanted = batch, dtype, device, tuple(specs), self.whole, by_head
        for idle in reversed(self.idle):
            known = idle.batch, idle.dtype, idle.device, idle.specs, idle.whole, idle.by_head
            if known == wanted and self._take(idle) and idle.fit_anew(capacity, retention):
                idle.use_here()
                idle.clear()
                return idle
        return None

    def _new(self, form: _Form, by_head: bool) -> CacheBuffers:
        retention = form[-1]
        made = CacheBuffers.new(*form[:-1], self.longest, self.whole, retention, by_head)
        made.use_here()
        return made

    def by_head(
        self,
        specs: Sequence[LayerCacheSpec],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        retention: Retention,
    ) -> bool:
        """Return whether buffers that `acquire` makes have each K/V head by itself."""
        if self.whole or not growing_memory.is_worth_it(device, any(retention)):
            return False
        block = growing_memory.block_of(device)
        return takes_less_by_head(tuple(specs), batch, capacity, dtype, block, retention)

    def _take(self, buffers: CacheBuffers) -> bool:
        """Keep buffers no longer; returns whether nobody else has taken them."""
        self._budget.forget(buffers)
        return self._kept.pop(id(buffers), None) is not None

    def release(self, buffers: CacheBuffers) -> None:
        """Take back the buffers of a request that is gone."""
        if self.keep and not buffers.shown:
            self._kept[id(buffers)] = buffers
            self._budget.keep(buffers, "buffers", self._let_go)
            if id(buffers) not in self._kept:  # somebody was faster
                self._budget.forget(buffers)

    def _let_go(self, buffers: CacheBuffers) -> None:
        self._kept.pop(id(buffers), None)

    def clear(self) -> None:
        """Free the buffers that are kept."""
        for buffers in self.idle:
            self._take(buffers)


class BufferLease:
    """The buffers that one request works on; they go back to the pool when the lease is gone.

    Attributes:
        buffers: what the request works on; None while it has none.
    """

    def __init__(self, pool: BufferPool) -> None:
        self.buffers: CacheBuffers | None = None
        self._pool = pool
        self._return: weakref.finalize[..., BufferLease] | None = None

    def hold(self, buffers: CacheBuffers) -> None:
        """Work on `buffers` from now on, and give back those from before."""
        self.release()
        self.buffers = buffers
        self._return = weakref.finalize(self, self._pool.release, buffers)
        self._return.atexit = False

    def release(self) -> None:
        """Give the buffers back now, if there are any."""
        self.buffers = None
        if self._return is not None:
            self._return()
