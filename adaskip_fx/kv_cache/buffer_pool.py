"""Buffers are leased to one request at a time, and one set of them is kept for the next request.

A captured CUDA graph holds the addresses of the buffers it works on. Where graphs are recorded,
the buffers of a request that has ended are therefore kept for the next one, with the graphs that
were recorded on them.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import torch

from .buffers import CacheBuffers
from .layer_spec import LayerCacheSpec
from .retention import Retention

_LONGEST = 2**20  # tokens, of a model without a limit


class BufferPool:
    """Makes buffers, and keeps the last ones that came back if `keep` says so.

    One set is kept, not more: the next request is likely to be like the last one, and memory that
    nobody uses is worth more elsewhere.

    Requests of several threads acquire from one pool, and buffers come back in a finalizer: in any
    thread, in the middle of a collection of garbage, also of one that an allocation in `acquire`
    set off. A lock would wait for itself there. What is kept is therefore in a deque: no other
    thread and no finalizer can come between its single operations.

    Attributes:
        keep: whether buffers are kept for the next request.
        longest: tokens that buffers may grow to in place, where a device can.
        whole: whether steps read all of a buffer, filled or not.
    """

    def __init__(self, keep: bool, longest: int | None = None) -> None:
        self.keep = keep
        self.longest = longest or _LONGEST
        self.whole = False
        self._kept: deque[CacheBuffers] = deque(maxlen=1)

    @property
    def idle(self) -> CacheBuffers | None:
        """The buffers that are kept for the next request, to be looked at."""
        try:
            return self._kept[-1]
        except IndexError:
            return None

    @property
    def idle_bytes(self) -> int:
        """Bytes of the buffers that are kept for the next request."""
        idle = self.idle
        return idle.nbytes if idle is not None else 0

    def acquire(
        self,
        specs: Sequence[LayerCacheSpec],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        retention: Retention = (),
    ) -> CacheBuffers:
        """Return buffers with memory for `capacity` tokens or more; nobody else has them."""
        idle = self._taken()
        if (
            idle is not None
            and (idle.batch, idle.dtype, idle.device, idle.specs, idle.whole)
            == (batch, dtype, device, tuple(specs), self.whole)
            and idle.fit_anew(capacity, retention)
        ):
            idle.use_here()
            idle.clear()
            return idle
        del idle  # before the new ones are made
        form = specs, batch, capacity, dtype, device
        made = CacheBuffers.new(*form, self.longest, self.whole, retention)
        made.use_here()
        return made

    def _taken(self) -> CacheBuffers | None:
        """Return the buffers that were kept, which are not kept any more."""
        try:
            return self._kept.pop()
        except IndexError:
            return None

    def release(self, buffers: CacheBuffers) -> None:
        """Take back the buffers of a request that is gone."""
        if self.keep and not buffers.shown:
            self._kept.append(buffers)

    def clear(self) -> None:
        """Free the buffers that are kept."""
        self._kept.clear()


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
