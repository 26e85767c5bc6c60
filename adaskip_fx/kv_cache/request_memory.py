"""What one request stores: its length, its rows, and buffers for attention and mixers that run.

A step gets views of the filled length of its buffers, new tokens included, so that it attends to
nothing that is not there. Lengths are kept on the host, never in a layer, which may be skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .buffer_pool import BufferLease
from .buffers import CacheBuffers
from .capacity import ahead, blocks, grown
from .layer_spec import LayerCacheSpec, StateKind
from .owner import Owner
from .padding import LastMask
from .retention import Retention
from .step_views import step_view
from .views import DynamicCacheView


class RequestMemory:
    """The length, the rows and the buffers of one request.

    Attributes:
        owner: the runtime that made it; no other may use it.
        specs: what each layer of the model stores.
        kept: what of it this request stores: nothing for what its prompts skip.
        dtype, device: of keys and values.
        length: tokens stored so far.
        batch: rows of the buffers.
        expected: tokens that the request may come to, if somebody knows.
        padded: whether any token stored is padding, or was masked for another reason.
        request: the owner's state of this request (its plan and decode window).
        retention: what it may read of each layer; all of it when empty.
        lease: the request's buffers.
        mask: the last one that was read.
        stateful: whether mixers keep states, which cannot forget a token.
        reordered: how often other rows were chosen.
        for_one_call: whether nobody reads it after the prompt that it is made for.
    """

    def __init__(
        self,
        owner: Owner,
        specs: Sequence[LayerCacheSpec],
        kept: Sequence[LayerCacheSpec],
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = 0,
    ) -> None:
        self.owner = owner
        self.specs = tuple(specs)
        self.kept, self.stateful = tuple(kept), any(s.mixes for s in kept)
        self.dtype = dtype
        self.device = device
        self.length = self.batch = self.reordered = 0
        self.padded = self.for_one_call = False
        self.request: Any = None
        self.retention: Retention = ()
        self.lease = BufferLease(owner.buffer_pool)
        self.expected = 0
        self.mask = LastMask()
        self._at_once = capacity

    @property
    def stored(self) -> tuple[bool, ...]:
        """Whether keys and values are stored, by layer."""
        return tuple(spec.attends for spec in self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, for the attention and mixers that run and no others."""
        return self.lease.buffers.nbytes if self.lease.buffers is not None else 0

    @property
    def capacity(self) -> int:
        """Tokens that fit before the buffers grow."""
        return self.lease.buffers.capacity if self.lease.buffers is not None else 0

    @property
    def keys(self) -> list[torch.Tensor | None]:
        """Key buffers [batch, heads, room, dim] by layer; None where nothing is stored."""
        return self.lease.buffers.keys if self.lease.buffers else [None] * len(self.specs)

    @property
    def values(self) -> list[torch.Tensor | None]:
        """Value buffers [batch, heads, room, dim] by layer; None where nothing is stored."""
        return self.lease.buffers.values if self.lease.buffers else [None] * len(self.specs)

    # What is stored --------------------------------------------------------------------------

    def keep(self, kept: Sequence[LayerCacheSpec], retention: Retention) -> None:
        """Store `kept` from now on. Only while nothing is stored: buffers for others go back."""
        assert not self.length
        if (self.kept, self.retention) != (tuple(kept), retention):
            self.kept, self.stateful = tuple(kept), any(s.mixes for s in kept)
            self.retention = retention
            self.lease.release()

    def renew(
        self,
        specs: Sequence[LayerCacheSpec],
        kept: Sequence[LayerCacheSpec],
        retention: Retention,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Store this from now on, where the model has been changed since the cache was made.

        Only while nothing is stored.
        """
        if (self.specs, self.dtype, self.device) != (tuple(specs), dtype, device):
            self.lease.release()
            self.specs, self.dtype, self.device = tuple(specs), dtype, device
        self.keep(kept, retention)

    def reserve(self, batch: int, tokens: int) -> CacheBuffers:
        """Return buffers with room for `tokens` more tokens; they are made or grown as needed.

        Raises:
            ValueError: the cache was filled with another batch size.
        """
        buffers = self._fitting(batch, tokens)
        if self.length + tokens > buffers.sliding.reached:
            # (padded rows have first tokens of their own; what is shown stays)
            forget = not (self.padded or buffers.shown)
            buffers.sliding.slide(self.length, self.length + tokens, forget)
        return buffers

    def _fitting(self, batch: int, tokens: int) -> CacheBuffers:
        if self.length and batch != self.batch:
            raise ValueError(
                f"past_key_values holds a batch of {self.batch}, the new input has {batch} rows"
            )
        buffers, total = self.lease.buffers, self.length + tokens
        if buffers is not None and buffers.sliding.gone and not self.length:
            buffers.sliding.begin(self.retention)
        if buffers is None or batch != self.batch or total > buffers.capacity:
            return self._grow(batch, total)
        if buffers.whole != self.owner.buffer_pool.whole:  # since the last step
            return self._move(buffers, buffers.capacity)
        more = ahead(tokens, total, buffers.capacity, self.expected)
        if more is not None:
            if self._outgrown(buffers, more):
                return self._move(buffers, more)
            buffers.grow_ahead(more)
        return buffers

    def _grow(self, batch: int, total: int) -> CacheBuffers:
        old = self.lease.buffers if batch == self.batch else None
        longest = self.owner.buffer_pool.longest
        capacity = grown(total, self.length, self.expected, self._at_once, longest)
        stays = old is not None and not self._outgrown(old, capacity)
        if (
            old is not None
            and stays
            and (old.fit(capacity) if self.length else old.fit_anew(capacity, self.retention))
        ):
            return old
        if old is not None and self.length:
            return self._move(old, capacity)
        self.lease.release()  # nothing to copy: let it be used again
        self._hold(new := self._acquire(batch, capacity))
        return new

    def _outgrown(self, old: CacheBuffers, capacity: int) -> bool:
        """Return whether so many tokens are to lie head by head, which they don't in `old`."""
        form = self.kept, old.batch, capacity, self.dtype, self.device
        return not old.by_head and self.owner.buffer_pool.by_head(*form, self.retention)

    def _move(self, old: CacheBuffers, capacity: int) -> CacheBuffers:
        new = self._acquire(old.batch, capacity)
        new.take(old, self.length)
        self._hold(new)
        return new

    def _acquire(self, batch: int, capacity: int) -> CacheBuffers:
        form = self.kept, batch, capacity, self.dtype, self.device
        return self.owner.buffer_pool.acquire(*form, self.retention)

    def copy_buffers(self, other: RequestMemory) -> None:
        """Work on a copy of what another request of the same plan stores."""
        if other.lease.buffers is None or not other.length:
            return
        new = self._acquire(other.batch, blocks(other.length + 1))
        new.take(other.lease.buffers, other.length)
        self._hold(new)

    def _hold(self, buffers: CacheBuffers) -> None:
        """Work on `buffers` from now on; those from before go back."""
        self.lease.hold(buffers)
        self.batch = buffers.batch

    # Steps -----------------------------------------------------------------------------------

    def step_view(self, batch: int, tokens: int, prefill: bool) -> DynamicCacheView:
        """Return views for a step of `tokens` new tokens; buffers are made or grown as needed.

        Raises:
            ValueError: the cache was filled with another batch size.
        """
        buffers, total = self.reserve(batch, tokens), self.length + tokens
        return step_view(buffers, self.specs, total, tokens, prefill)

    def advance(self, tokens: int) -> None:
        """Count a step's tokens as stored."""
        self.length += tokens

    def keep_first(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens; all are kept where there are no more.

        (`crop` is transformers', and takes the number of tokens to forget, less than 0.)

        Raises:
            NotImplementedError: mixers keep states, which cannot forget single tokens; or windows
                would see tokens that are not held any more.
        """
        if tokens >= self.length:
            return
        if tokens and self.lease.buffers is not None:
            self.lease.buffers.sliding.check_back(tokens)
        if self.stateful and tokens:
            raise NotImplementedError(
                "this cache cannot be cropped: a recurrent mixer's state cannot forget a token"
            )
        self._unshare(tokens)
        self.length, self.padded = tokens, self.padded and tokens > 0
        self.mask.keep_first(tokens)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Go on with other rows: `rows` of those there are, in that order, each as often as named.

        Where there are as many as before, buffers stay where they are, with what was recorded on
        them.

        Args:
            rows: int64 [new batch], on the CPU.

        Raises:
            ValueError: no rows, or not a list of them.
        """
        if rows.dim() != 1 or not rows.numel():
            raise ValueError(
                f"rows of this cache are chosen by a list of at least one, got {list(rows.shape)}"
            )
        old = self.lease.buffers
        if not self.length or old is None:  # as in transformers: there are no rows yet
            return
        request, self.mask = self.request.of_rows(rows, self.batch), LastMask()
        self.reordered += 1
        new, batch = old, rows.numel()
        if old.shown or batch != self.batch:
            new = self._acquire(batch, blocks(self.length + 1))
        new.take_rows(old, rows, self.length)
        if new is not old:
            self._hold(new)
        self.request = request

    def _unshare(self, tokens: int) -> None:
        """Leave to others what they were shown, before any of it is overwritten."""
        old = self.lease.buffers
        if old is None or not old.shown:
            return
        if not tokens:
            self.lease.release()
            return
        self.length = tokens
        self._move(old, blocks(tokens + 1))

    # What it shows ---------------------------------------------------------------------------

    def filled(self, layer: int, buffer: torch.Tensor | None) -> torch.Tensor | None:
        """Return the filled part of a layer's buffer, to be looked at for as long as one likes.

        Raises:
            NotImplementedError: part of it is not held any more.
        """
        buffers = self.lease.buffers
        if buffer is None or buffers is None or not self.length:
            return None
        buffers.sliding.check_shown(layer)
        buffers.shown = True
        return buffer.narrow(2, 0, self.length)

    def states(self, layer: int, kind: StateKind) -> dict[int, torch.Tensor]:
        """Return a layer's states of a kind by index, to be looked at; none while it is empty."""
        buffers = self.lease.buffers
        if buffers is None or not self.length:
            return {}
        pairs = zip(self.kept[layer].states, buffers.states[layer], strict=True)
        found = {state.index: tensor for state, tensor in pairs if state.kind == kind}
        buffers.shown |= bool(found)
        return found
