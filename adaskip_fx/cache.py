"""The cache: storage only for attention and mixers that run, leased to one request.

Buffers are [batch, heads, capacity, dim]; a step is handed views of the filled length, new tokens
included, so that it attends to nothing that is not there. Lengths are kept here, on the host,
never in a layer: layer 0's attention may be skipped, or all of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from transformers.cache_utils import Cache

from .step_cache import StepCache, StepLayer
from .storage import Slot, Storage, StoragePool

_BLOCK = 256  # capacity grows in steps of this many tokens at least


class Owner(Protocol):
    """Who leases caches, and counts those that live."""

    storages: StoragePool

    def track(self, cache: SkipCache) -> None: ...


class SkipCache(Cache):
    """The ``past_key_values`` of a model compiled by adaskip_fx; one request's memory.

    Attributes:
        owner: the runtime that made it; no other may use it.
        slots: what each layer of the model stores.
        kept: what of it this request stores: nothing for what its prompts skip.
        length: tokens stored so far.
        padded: whether any token stored is padding, or was masked for another reason.
        prompting: whether what is fed now is a prompt, whatever its length (see `prompt`).
        request: the owner's state of this request (its plan and decode window).
    """

    is_compileable = False

    def __init__(
        self,
        owner: Owner,
        slots: Sequence[Slot],
        kept: Sequence[Slot],
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = 0,
    ) -> None:
        super().__init__(layers=[])
        self.owner = owner
        self.slots = tuple(slots)
        self.kept = tuple(kept)
        self.dtype = dtype
        self.device = device
        self.length = 0
        self.batch = 0
        self.padded = False
        self.prompting = False
        self.request: Any = None
        self._wanted = capacity
        self._storage: Storage | None = None
        self._lease: weakref.finalize[..., SkipCache] | None = None
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def stored(self) -> tuple[bool, ...]:
        """Which layers have keys and values."""
        return tuple(slot.attends for slot in self.kept)

    @property
    def is_linear(self) -> list[bool]:  # transformers 5.24 asks; without layers all() of it is true
        return [slot.mixes and not slot.attends for slot in self.slots]

    @property
    def stateful(self) -> bool:
        """Whether mixers keep states, which cannot forget a token."""
        return any(slot.mixes for slot in self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes of storage held, for the attention and mixers that run and no others."""
        return self._storage.nbytes if self._storage is not None else 0

    @property
    def capacity(self) -> int:
        """Tokens that fit before storage grows."""
        return self._storage.capacity if self._storage is not None else 0

    @property
    def keys(self) -> list[torch.Tensor | None]:
        """Buffers [batch, heads, capacity, dim] by layer; None where nothing is stored."""
        return self._storage.keys if self._storage is not None else [None] * len(self.slots)

    @property
    def values(self) -> list[torch.Tensor | None]:
        """As `keys`."""
        return self._storage.values if self._storage is not None else [None] * len(self.slots)

    def keep(self, kept: Sequence[Slot]) -> None:
        """Store `kept` from now on. Only while nothing is stored: storage for others goes back."""
        assert not self.length
        if self.kept != tuple(kept):
            self.kept = tuple(kept)
            self._release()

    def renew(
        self, slots: Sequence[Slot], kept: Sequence[Slot], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Store this from now on, where the model has been changed since the cache was made.

        Only while nothing is stored.
        """
        if (self.slots, self.dtype, self.device) != (tuple(slots), dtype, device):
            self._release()
            self.slots, self.dtype, self.device = tuple(slots), dtype, device
        self.keep(kept)

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """What the model is fed with this cache meanwhile is a prompt, or a piece of one.

        A single token on a filled cache is otherwise taken for a decoded one, which runs under the
        plan for decoding. ``generate`` says so itself; a loop of one's own that cuts its prompts
        says it for the pieces that may have one token.
        """
        before, self.prompting = self.prompting, True
        try:
            yield
        finally:
            self.prompting = before

    def reserve(self, batch: int, tokens: int) -> Storage:
        """Storage with room for `tokens` more tokens; made or grown as needed.

        Raises:
            ValueError: the cache was filled with another batch size.
        """
        if self.length and batch != self.batch:
            raise ValueError(
                f"past_key_values holds a batch of {self.batch}, the new input has {batch} rows"
            )
        storage, total = self._storage, self.length + tokens
        if storage is None or batch != self.batch or total >= storage.capacity:
            storage = self._grow(batch, total)
        return storage

    def step(self, batch: int, tokens: int, fresh: bool) -> StepCache:
        """Views for a step of `tokens` new tokens; storage is made or grown as needed.

        Raises:
            ValueError: the cache was filled with another batch size.
        """
        storage, total = self.reserve(batch, tokens), self.length + tokens
        self._staged.clear()  # of a step that failed

        def absent(heads: int, dim: int) -> torch.Tensor:
            return self._absent(heads, dim, batch, total)

        layers = []
        for i, slot in enumerate(self.slots):
            keys, values, states = storage.layer(i, slot, absent)
            if self.kept[i].attends:
                assert keys is not None
                assert values is not None
                keys, values = self._view(keys, total), self._view(values, total)
            layers.append(StepLayer(slot, keys, values, states))
        filled, new = storage.lengths.narrow(0, 0, total), storage.lengths.narrow(0, 0, tokens)
        return StepCache(layers, filled, new, fresh)

    def advance(self, tokens: int) -> None:
        """Count a step's tokens as stored."""
        self.length += tokens
        for stored, staged in self._staged:
            stored.copy_(staged)
        self._staged.clear()

    def _view(self, buffer: torch.Tensor, total: int) -> torch.Tensor:
        """The filled part of a buffer.

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

    def _grow(self, batch: int, total: int) -> Storage:
        old = self._storage
        grown = max(total, self._wanted, self.capacity * 3 // 2 if self.length else 0) + 1
        # one token more than is ever filled: a full buffer would be contiguous, which the
        # captured graphs exclude
        capacity = -(-grown // _BLOCK) * _BLOCK
        if old is not None and not self.length:  # nothing to copy: let it be used again
            self._release()
        new = self.owner.storages.lease(self.kept, batch, capacity, self.dtype, self.device)
        if old is not None and self.length:
            new.take(old, self.length)
            self._release()
        self._hold(new)
        return new

    def _hold(self, storage: Storage) -> None:
        self._storage, self.batch = storage, storage.batch
        self._lease = weakref.finalize(self, self.owner.storages.give_back, storage)
        self._lease.atexit = False

    def _release(self) -> None:
        self._storage = None
        if self._lease is not None:
            self._lease()

    def _absent(self, heads: int, dim: int, batch: int, total: int) -> torch.Tensor:
        """Shape and strides of keys or values without storage, for the guards; no memory."""
        room = self.capacity if total > 1 else 1
        strides = (heads * room * dim, room * dim, dim, 1)
        size = (batch, heads, total, dim)
        return torch.empty_strided(size, strides, dtype=self.dtype, device="meta")

    # What transformers asks of a cache -------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens stored; the same for every layer, whether its attention runs or not."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next token."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys after `query_length` more tokens."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: storage grows."""
        return -1

    def __len__(self) -> int:
        return len(self.slots)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        kept = sum(slot.attends or slot.mixes for slot in self.kept)
        return (
            f"SkipCache({self.length} tokens, {kept} of {len(self.slots)} layers stored, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SkipCache:
        """A second request with the same past (prefix caching); the buffers are copied."""
        twin = SkipCache(self.owner, self.slots, self.kept, self.dtype, self.device, self._wanted)
        twin.length, twin.padded = self.length, self.padded
        if self._storage is not None:
            twin._hold(self._storage.copy())
        twin.request = self.request.copy()
        memo[id(self)] = twin
        self.owner.track(twin)
        return twin

    def crop(self, tokens: int) -> None:
        """Forget tokens: the last ``-tokens`` when negative, else all but the first `tokens`.

        Raises:
            NotImplementedError: mixers keep states, which cannot forget single tokens.
        """
        length = max(0, self.length + tokens) if tokens < 0 else min(tokens, self.length)
        if self.stateful and 0 < length < self.length:
            raise NotImplementedError(
                "this cache cannot be cropped: a recurrent mixer's state cannot forget a token"
            )
        self.length = length

    def reset(self) -> None:
        """Forget everything; storage is kept for the next prompt."""
        self.length, self.padded = 0, False
        self.request = self.request.anew()

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "this cache cannot be reordered: beam search and contrastive search are not "
            "supported by adaskip_fx; use greedy search or sampling"
        )

    reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Called by a model's attention: it was not captured with this cache."""
        raise NotImplementedError(
            "this cache belongs to a compiled model, which stores only what its plan runs; the "
            "original model needs a cache of its own"
        )
