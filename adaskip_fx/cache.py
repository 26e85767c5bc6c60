"""The KV cache: storage only for attention that runs, leased to one request.

Buffers are [batch, heads, capacity, dim]; a step is handed views of the filled length, new tokens
included, so that it attends to nothing that is not there. Lengths are kept here, on the host,
never in a layer: layer 0's attention may be skipped, or all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from transformers.cache_utils import Cache

_BLOCK = 256  # capacity grows in steps of this many tokens at least


@dataclass(frozen=True)
class Slot:
    """Shapes of what one layer stores: heads and dimension of its keys and of its values."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    def nbytes(self, batch: int, tokens: int, itemsize: int) -> int:
        """Bytes of K and V for `tokens` tokens."""
        width = self.key_heads * self.key_dim + self.value_heads * self.value_dim
        return batch * tokens * width * itemsize


class StepLayer:
    """One layer's keys and values during one step, [batch, heads, filled, dim]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values


class StepCache(Cache):
    """What a step's graph sees of the cache: views of the filled length, new tokens at the end.

    Attributes:
        layers: one StepLayer per decoder layer; of a layer without storage, meta tensors.
        filled, new: tensors as long as the filled cache and as the new tokens; only their lengths
            are used (an integer attribute would be captured as a constant).
        fresh: True in prefill, when the new tokens are all there is: attention then reads the
            fresh keys and values instead of the stored ones.
    """

    is_compileable = False
    is_sliding: Any = ()
    is_linear: Any = ()
    is_dummy: Any = ()

    def __init__(
        self, layers: Sequence[StepLayer], filled: torch.Tensor, new: torch.Tensor, fresh: bool
    ) -> None:
        super().__init__(layers=list(layers))
        self.filled = filled
        self.new = new
        self.fresh = fresh
        self.is_sliding = self.is_linear = self.is_dummy = [False] * len(self.layers)

    def unify(self, tokens: int) -> None:
        """Tell the tracer that all layers have one length, and in prefill that it is `tokens`."""
        total = self.filled.shape[0]
        if self.new.shape[0] != tokens or (self.fresh and tokens != total):
            raise ValueError(f"{tokens} tokens for a step of {self.new.shape[0]}")
        for layer in self.layers:
            if layer.keys.shape[2] != total or layer.values.shape[2] != total:
                raise ValueError("layers of one cache have different lengths")

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [B, H, T, D]; returns what attention reads."""
        layer, tokens = self.layers[layer_idx], key_states.shape[2]
        start = self.filled.shape[0] - tokens
        layer.keys.narrow(2, start, tokens).copy_(key_states)
        layer.values.narrow(2, start, tokens).copy_(value_states)
        if self.fresh:
            return key_states, value_states
        return layer.keys, layer.values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not to be asked for: positions are always handed to the model."""
        raise RuntimeError("positions are inputs of a captured step, not read from its cache")

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first query in prefill; later ones are never maskless by position."""
        if self.fresh:
            return 0
        return self.filled.shape[0] - self.new.shape[0]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that attention reads."""
        return self.filled.shape[0], 0


class Owner(Protocol):
    """Who leases caches, and counts those that live."""

    def track(self, cache: SkipCache) -> None: ...


class SkipCache(Cache):
    """The ``past_key_values`` of a model compiled by adaskip_fx; one request's memory.

    Attributes:
        owner: the runtime that made it; no other may use it.
        length: tokens stored so far.
        request: the owner's state of this request (its plan and decode window).
    """

    is_compileable = False

    def __init__(
        self,
        owner: Owner,
        slots: Sequence[Slot],
        stored: Sequence[bool],
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = 0,
    ) -> None:
        super().__init__(layers=[])
        self.owner = owner
        self.slots = tuple(slots)
        self.stored = tuple(stored)
        self.dtype = dtype
        self.device = device
        self.length = 0
        self.batch = 0
        self.request: Any = None
        self._wanted = capacity
        self._capacity = 0
        self._keys: list[torch.Tensor | None] = [None] * len(self.slots)
        self._values: list[torch.Tensor | None] = [None] * len(self.slots)
        self._lengths = torch.empty(0, dtype=torch.int8)
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of storage held, for the attention sublayers that run and no others."""
        held = (t for t in (*self._keys, *self._values) if t is not None)
        return sum(t.nbytes for t in held)

    @property
    def capacity(self) -> int:
        """Tokens that fit before storage grows."""
        return self._capacity

    def step(self, batch: int, tokens: int, fresh: bool) -> StepCache:
        """Views for a step of `tokens` new tokens; storage is made or grown as needed.

        Raises:
            ValueError: the cache was filled with another batch size.
        """
        if self.length and batch != self.batch:
            raise ValueError(
                f"past_key_values holds a batch of {self.batch}, the new input has {batch} rows"
            )
        total = self.length + tokens
        self._staged.clear()  # of a step that failed
        if batch != self.batch or total >= self._capacity:
            self._reserve(batch, total)
        layers = []
        for slot, keys, values in zip(self.slots, self._keys, self._values, strict=True):
            if keys is None or values is None:
                layers.append(self._absent(slot, batch, total))
            else:
                layers.append(StepLayer(self._view(keys, total), self._view(values, total)))
        filled, new = self._lengths.narrow(0, 0, total), self._lengths.narrow(0, 0, tokens)
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

    def _reserve(self, batch: int, total: int) -> None:
        grown = max(total, self._wanted, self._capacity * 3 // 2 if self.length else 0) + 1
        # one token more than is ever filled: a full buffer would be contiguous, which the
        # captured graphs exclude
        capacity = -(-grown // _BLOCK) * _BLOCK
        # buffers must not be inference tensors: they may be written outside inference mode later
        with torch.inference_mode(False):
            for i, (slot, stored) in enumerate(zip(self.slots, self.stored, strict=True)):
                if stored:
                    self._keys[i] = self._grown(
                        self._keys[i], (batch, slot.key_heads, capacity, slot.key_dim)
                    )
                    self._values[i] = self._grown(
                        self._values[i], (batch, slot.value_heads, capacity, slot.value_dim)
                    )
            self._lengths = torch.empty(capacity, dtype=torch.int8)
        self._capacity, self.batch = capacity, batch

    def _grown(self, old: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        new = torch.empty(shape, dtype=self.dtype, device=self.device)
        if old is not None and self.length:
            new.narrow(2, 0, self.length).copy_(old.narrow(2, 0, self.length))
        return new

    def _absent(self, slot: Slot, batch: int, total: int) -> StepLayer:
        """Shapes and strides of a layer without storage, for the guards; no memory."""

        def shaped(heads: int, dim: int) -> torch.Tensor:
            room = self._capacity if total > 1 else 1
            strides = (heads * room * dim, room * dim, dim, 1)
            size = (batch, heads, total, dim)
            return torch.empty_strided(size, strides, dtype=self.dtype, device="meta")

        return StepLayer(
            shaped(slot.key_heads, slot.key_dim), shaped(slot.value_heads, slot.value_dim)
        )

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

    get_max_cache_shape = get_max_length

    def __len__(self) -> int:
        return len(self.slots)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        kept = sum(self.stored)
        return (
            f"SkipCache({self.length} tokens, {kept} of {len(self.slots)} layers stored, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SkipCache:
        """A second request with the same past (prefix caching); the buffers are copied."""
        twin = SkipCache(self.owner, self.slots, self.stored, self.dtype, self.device, self._wanted)
        twin.__dict__.update(self.__dict__)
        twin._keys = [None if t is None else t.clone() for t in self._keys]
        twin._values = [None if t is None else t.clone() for t in self._values]
        twin._staged = []
        twin.request = self.request.copy()
        memo[id(self)] = twin
        self.owner.track(twin)
        return twin

    def crop(self, tokens: int) -> None:
        """Forget tokens: the last ``-tokens`` when negative, else all but the first `tokens`."""
        self.length = max(0, self.length + tokens) if tokens < 0 else min(tokens, self.length)

    def reset(self) -> None:
        """Forget everything; storage is kept for the next prompt."""
        self.length = 0
        self.request = self.request.fresh()

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
