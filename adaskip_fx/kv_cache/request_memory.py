"""What one request stores: its length, its rows, and buffers for attention and mixers that run.

Buffers are [batch, heads, capacity, dim]; a step gets views of the filled length, new tokens
included, so that it attends to nothing that is not there. Lengths are kept here, on the host,
never in a layer: layer 0's attention may be skipped, or all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from .buffer_pool import BufferLease
from .buffers import CacheBuffers
from .layer_spec import LayerCacheSpec, StateKind
from .owner import Owner
from .views import DynamicCacheView, LayerView

_BLOCK = 256  # capacity grows in steps of this many tokens at least


class RequestMemory:
    """The length, the rows and the buffers of one request.

    Attributes:
        owner: the runtime that made it; no other may use it.
        specs: what each layer of the model stores.
        kept: what of it this request stores: nothing for what its prompts skip.
        dtype, device: of keys and values.
        length: tokens stored so far.
        batch: rows of the buffers.
        padded: whether any token stored is padding, or was masked for another reason.
        request: the owner's state of this request (its plan and decode window).
        lease: the request's buffers.
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
        self.kept = tuple(kept)
        self.dtype = dtype
        self.device = device
        self.length = 0
        self.batch = 0
        self.padded = False
        self.request: Any = None
        self.lease = BufferLease(owner.buffer_pool)
        self._wanted = capacity
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def stored(self) -> tuple[bool, ...]:
        """Whether keys and values are stored, by layer."""
        return tuple(spec.attends for spec in self.kept)

    @property
    def stateful(self) -> bool:
        """Whether mixers keep states, which cannot forget a token."""
        return any(spec.mixes for spec in self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, for the attention and mixers that run and no others."""
        buffers = self.lease.buffers
        return buffers.nbytes if buffers is not None else 0

    @property
    def capacity(self) -> int:
        """Tokens that fit before the buffers grow."""
        buffers = self.lease.buffers
        return buffers.capacity if buffers is not None else 0

    @property
    def keys(self) -> list[torch.Tensor | None]:
        """Key buffers [batch, heads, capacity, dim] by layer; None where nothing is stored."""
        buffers = self.lease.buffers
        return buffers.keys if buffers is not None else [None] * len(self.specs)

    @property
    def values(self) -> list[torch.Tensor | None]:
        """Value buffers [batch, heads, capacity, dim] by layer; None where nothing is stored."""
        buffers = self.lease.buffers
        return buffers.values if buffers is not None else [None] * len(self.specs)

    # What is stored --------------------------------------------------------------------------

    def keep(self, kept: Sequence[LayerCacheSpec]) -> None:
        """Store `kept` from now on. Only while nothing is stored: buffers for others go back."""
        assert not self.length
        if self.kept != tuple(kept):
            self.kept = tuple(kept)
            self.lease.release()

    def renew(
        self,
        specs: Sequence[LayerCacheSpec],
        kept: Sequence[LayerCacheSpec],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Store this from now on, where the model has been changed since the cache was made.

        Only while nothing is stored.
        """
        if (self.specs, self.dtype, self.device) != (tuple(specs), dtype, device):
            self.lease.release()
            self.specs, self.dtype, self.device = tuple(specs), dtype, device
        self.keep(kept)

    def reserve(self, batch: int, tokens: int) -> CacheBuffers:
        """Return buffers with room for `tokens` more tokens; they are made or grown as needed.

        Raises:
            ValueError: the cache was filled with another batch size.
        """
        if self.length and batch != self.batch:
            raise ValueError(
                f"past_key_values holds a batch of {self.batch}, the new input has {batch} rows"
            )
        buffers, total = self.lease.buffers, self.length + tokens
        if buffers is None or batch != self.batch or total >= buffers.capacity:
            buffers = self._grow(batch, total)
        return buffers

    def _grow(self, batch: int, total: int) -> CacheBuffers:
        old = self.lease.buffers
        grown = max(total, self._wanted, self.capacity * 3 // 2 if self.length else 0) + 1
        # one token more than is ever filled: a full buffer would be contiguous, which the
        # captured graphs exclude
        capacity = -(-grown // _BLOCK) * _BLOCK
        if old is not None and not self.length:  # nothing to copy: let it be used again
            self.lease.release()
        new = self._acquire(batch, capacity)
        if old is not None and self.length:
            new.take(old, self.length)
        self._hold(new)
        return new

    def _acquire(self, batch: int, capacity: int) -> CacheBuffers:
        return self.owner.buffer_pool.acquire(self.kept, batch, capacity, self.dtype, self.device)

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
        self._staged.clear()  # of a step that failed
        absent = functools.partial(self._absent, batch=batch, total=total)
        layers = []
        for i, spec in enumerate(self.specs):
            keys, values, states = buffers.layer(i, spec, absent)
            if self.kept[i].attends:
                assert keys is not None
                assert values is not None
                keys, values = self._view(keys, total), self._view(values, total)
            layers.append(LayerView(spec, keys, values, states))
        filled, new = buffers.lengths.narrow(0, 0, total), buffers.lengths.narrow(0, 0, tokens)
        return DynamicCacheView(layers, filled, new, prefill)

    def advance(self, tokens: int) -> None:
        """Count a step's tokens as stored."""
        self.length += tokens
        for stored, staged in self._staged:
            stored.copy_(staged)
        self._staged.clear()

    def _view(self, buffer: torch.Tensor, total: int) -> torch.Tensor:
        """Return the filled part of a buffer.

        A length of one is not symbolic, and then neither are strides: the buffer's capacity would
        become a constant of the graph. The first token is therefore stored by way of a tensor of
        its own.
        """
        view = buffer.narrow(2, 0, total)
        if total > 1:
            return view
        staged = torch.empty_like(view, memory_format=torch.contiguous_format)
        self._staged.append((view, staged))
        return staged

    def _absent(self, heads: int, dim: int, batch: int, total: int) -> torch.Tensor:
        """Return shape and strides of keys or values without a buffer, for the guards."""
        room = self.capacity if total > 1 else 1
        strides = (heads * room * dim, room * dim, dim, 1)
        size = (batch, heads, total, dim)
        return torch.empty_strided(size, strides, dtype=self.dtype, device="meta")

    # Rows and lengths ------------------------------------------------------------------------

    def keep_first(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens; all are kept where there are no more.

        (`crop` is transformers', and takes the number of tokens to forget, less than 0.)

        Raises:
            NotImplementedError: mixers keep states, which cannot forget single tokens.
        """
        if tokens >= self.length:
            return
        if self.stateful and tokens:
            raise NotImplementedError(
                "this cache cannot be cropped: a recurrent mixer's state cannot forget a token"
            )
        self._unshare(tokens)
        self.length = tokens
        self.padded = self.padded and tokens > 0

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
        request = self.request.of_rows(rows)
        new, batch = old, rows.numel()
        if old.shown or batch != self.batch:
            new = self._acquire(batch, old.capacity)
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
        new = self._acquire(old.batch, old.capacity)
        new.take(old, tokens)
        self._hold(new)

    # What it shows ---------------------------------------------------------------------------

    def filled(self, buffer: torch.Tensor | None) -> torch.Tensor | None:
        """Return the filled part of a buffer, to be looked at for as long as anybody likes."""
        buffers = self.lease.buffers
        if buffer is None or buffers is None or not self.length:
            return None
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
