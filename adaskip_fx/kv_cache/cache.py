"""The cache: storage only for attention and mixers that run, leased to one request.

Buffers are [batch, heads, capacity, dim]; a step is handed views of the filled length, new tokens
included, so that it attends to nothing that is not there. Lengths are kept here, on the host,
never in a layer: layer 0's attention may be skipped, or all of it.

Towards users it is what `DynamicCache()` of transformers is, and means the same, or refuses by
name (`REFUSED`). Like one that is made without a config it forgets no token outside of a sliding
window, so that it can always be cropped; states of mixers are kept as by one with a config.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .buffers import BufferPool, CacheBuffers, LayerCacheSpec, StateKind
from .layers import layers_of
from .views import DynamicCacheView, LayerView

_BLOCK = 256  # capacity grows in steps of this many tokens at least

_ONLY_COMPILED = (
    "this cache belongs to a compiled model, which stores only what its plan runs; the original "
    "model needs a cache of its own"
)
_STAYS = (
    "this cache cannot be offloaded: a compiled model's buffers stay on the model's device; leave "
    "offloading out"
)
#: Methods of transformers' `DynamicCache` that are refused, and in which words.
REFUSED = {
    "update": _ONLY_COMPILED,  # called by a model's attention that was not captured with this cache
    "update_conv_state": _ONLY_COMPILED,
    "update_recurrent_state": _ONLY_COMPILED,
    "update_indexer": _ONLY_COMPILED,
    "offload": _STAYS,
    "prefetch": _STAYS,
    "early_initialization": (
        "this cache cannot be initialized by hand: its storage is made with the first prompt; "
        "leave the call out, or say how much with new_cache(capacity=...)"
    ),
}


class Owner(Protocol):
    """Who leases caches, and counts those that live."""

    buffer_pool: BufferPool

    @property
    def model(self) -> Any:
        """Whose keys and values are stored."""

    def track(self, cache: SkipCache) -> None: ...

    def save_cache(self, cache: SkipCache, path: str | Path) -> None: ...


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
    offloading = False
    layer_class_to_replicate = None  # as many layers as the model has, from the beginning

    def __init__(
        self,
        owner: Owner,
        slots: Sequence[LayerCacheSpec],
        kept: Sequence[LayerCacheSpec],
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = 0,
    ) -> None:
        # (transformers' own would make an attribute of `layers`, which is a property here)
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
        self._storage: CacheBuffers | None = None
        self._acquired: weakref.finalize[..., SkipCache] | None = None
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def stored(self) -> tuple[bool, ...]:
        """Which layers have keys and values."""
        return tuple(slot.attends for slot in self.kept)

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

    def keep(self, kept: Sequence[LayerCacheSpec]) -> None:
        """Store `kept` from now on. Only while nothing is stored: storage for others goes back."""
        assert not self.length
        if self.kept != tuple(kept):
            self.kept = tuple(kept)
            self._release()

    def renew(
        self,
        slots: Sequence[LayerCacheSpec],
        kept: Sequence[LayerCacheSpec],
        dtype: torch.dtype,
        device: torch.device,
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

    def reserve(self, batch: int, tokens: int) -> CacheBuffers:
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

    def step(self, batch: int, tokens: int, fresh: bool) -> DynamicCacheView:
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
            layers.append(LayerView(slot, keys, values, states))
        filled, new = storage.lengths.narrow(0, 0, total), storage.lengths.narrow(0, 0, tokens)
        return DynamicCacheView(layers, filled, new, fresh)

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

    def _grow(self, batch: int, total: int) -> CacheBuffers:
        old = self._storage
        grown = max(total, self._wanted, self.capacity * 3 // 2 if self.length else 0) + 1
        # one token more than is ever filled: a full buffer would be contiguous, which the
        # captured graphs exclude
        capacity = -(-grown // _BLOCK) * _BLOCK
        if old is not None and not self.length:  # nothing to copy: let it be used again
            self._release()
        new = self.owner.buffer_pool.acquire(self.kept, batch, capacity, self.dtype, self.device)
        if old is not None and self.length:
            new.take(old, self.length)
            self._release()
        self._hold(new)
        return new

    def _hold(self, storage: CacheBuffers) -> None:
        self._storage, self.batch = storage, storage.batch
        self._acquired = weakref.finalize(self, self.owner.buffer_pool.release, storage)
        self._acquired.atexit = False

    def _release(self) -> None:
        self._storage = None
        if self._acquired is not None:
            self._acquired()

    def _absent(self, heads: int, dim: int, batch: int, total: int) -> torch.Tensor:
        """Shape and strides of keys or values without storage, for the guards; no memory."""
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
        old = self._storage
        if not self.length or old is None:  # as in transformers: there are no rows yet
            return
        request = self.request.of_rows(rows)
        new, batch = old, rows.numel()
        if old.shown or batch != self.batch:
            slots, capacity = self.kept, old.capacity
            new = self.owner.buffer_pool.acquire(slots, batch, capacity, self.dtype, self.device)
        new.take_rows(old, rows, self.length)
        if new is not old:
            self._release()
            self._hold(new)
        self.request = request

    def anew(self) -> SkipCache:
        """An empty cache for the same request from its beginning: its plan and stop tokens."""
        other = SkipCache(self.owner, self.slots, self.kept, self.dtype, self.device, self._wanted)
        other.request = self.request.new_request(self.request.chosen)
        self.owner.track(other)
        return other

    def _unshare(self, tokens: int) -> None:
        """Leave to others what they were shown, before any of it is overwritten."""
        old = self._storage
        if old is None or not old.shown:
            return
        new = None
        if tokens:
            acquire = self.owner.buffer_pool.acquire
            new = acquire(self.kept, old.batch, old.capacity, self.dtype, self.device)
            new.take(old, tokens)
        self._release()
        if new is not None:
            self._hold(new)

    # What it shows ---------------------------------------------------------------------------

    @property
    def layers(self) -> list[Any]:
        """One object per layer of the model; see :mod:`adaskip_fx.kv_cache.layers`."""
        return layers_of(self)

    def filled(self, buffer: torch.Tensor | None) -> torch.Tensor | None:
        """What of a buffer is filled, to be looked at for as long as anybody likes."""
        if buffer is None or not self.length:
            return None
        assert self._storage is not None
        self._storage.shown = True
        return buffer.narrow(2, 0, self.length)

    def states(self, layer: int, kind: StateKind) -> dict[int, torch.Tensor]:
        """A layer's states of a kind by their index, as `filled` shows keys; none while empty."""
        if self._storage is None or not self.length:
            return {}
        held = zip(self.kept[layer].states, self._storage.states[layer], strict=True)
        found = {state.index: tensor for state, tensor in held if state.kind == kind}
        self._storage.shown |= bool(found)
        return found

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """All that is stored, by names such as ``3.keys``: for a moment, not to be kept."""
        assert self._storage is not None
        found: dict[str, torch.Tensor] = {}
        for i, (keys, values) in enumerate(self._pairs()):
            if keys is not None and values is not None:
                found[f"{i}.keys"] = keys.narrow(2, 0, self.length)
                found[f"{i}.values"] = values.narrow(2, 0, self.length)
            for state, tensor in zip(self.kept[i].states, self._storage.states[i], strict=True):
                found[f"{i}.{state.kind}.{state.index}"] = tensor
        return found

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, None]]:
        """Keys and values of each layer, and no sliding window, as `DynamicCache` has them.

        Raises:
            NotImplementedError: that is not all there is, so nothing could be made of it.
        """
        if self.stateful or self.kept != self.slots:
            raise NotImplementedError(
                "this cache is not keys and values of all layers: the plan skips attention, or "
                "mixers keep states; look at its layers one by one"
            )
        return ((self.filled(k), self.filled(v), None) for k, v in self._pairs())

    def _pairs(self) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        return list(zip(self.keys, self.values, strict=True))

    # What transformers asks of a cache -------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens stored; the same for every layer, whether its attention runs or not."""
        return self.length if layer_idx < len(self.slots) else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next token."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys after `query_length` more tokens."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: storage grows."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows; -1 while nothing is stored."""
        return self.batch if self.length else -1

    @property
    def is_initialized(self) -> bool:
        """Whether there are keys and values; as in transformers, states alone do not count."""
        return self.length > 0 and any(slot.attends for slot in self.slots)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: always, but for states."""
        return not self.stateful

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer that it forgets no token."""
        return [False] * len(self.slots)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers keep states and nothing else."""
        return [slot.mixes and not slot.attends for slot in self.slots]

    def activate_past_recording(self) -> None:
        """What this is for (to take tokens back later) is possible anyway, but for states.

        Raises:
            NotImplementedError: mixers keep states.
        """
        if self.stateful:
            raise NotImplementedError(
                "this cache cannot record the past: a recurrent mixer's state cannot forget a token"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, as transformers' `DynamicCache` does.

        What the installed version does with a number above 0 happens here as well: it is refused
        (ValueError), or before 5.20 it is how many tokens to keep.

        Raises:
            NotImplementedError: mixers keep states, which cannot forget single tokens.
        """
        layer = DynamicLayer()
        layer.is_initialized = True
        layer.keys = layer.values = torch.empty(1, 1, self.length, 1, device="meta")
        layer.crop(tokens_to_remove)
        self.keep_first(layer.keys.shape[2])

    def reset(self) -> None:
        """Forget everything; storage is kept for the next prompt."""
        self._unshare(0)
        self.length, self.padded = 0, False
        self.request = self.request.new_request()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on with the rows `beam_idx`, int64 [rows]."""
        if self.length:  # an empty cache has no rows yet
            self.keep_rows(self._rows().index_select(0, beam_idx.cpu()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after the other."""
        if self.length:
            self.keep_rows(self._rows().repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Go on with some rows: whatever a tensor's first dimension can be indexed with."""
        if self.length:
            self.keep_rows(self._rows()[indices.cpu() if torch.is_tensor(indices) else indices])

    def _rows(self) -> torch.Tensor:
        return torch.arange(self.batch, device="cpu")

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

    # Copies ----------------------------------------------------------------------------------

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

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "this cache cannot be copied without its buffers, which belong to one request; use "
            "copy.deepcopy"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "this cache cannot be pickled, since it belongs to a compiled model; save(path) it, "
            "and load it with load_cache(path) of the compiled model's .adaskip"
        )

    def become(self, other: Cache) -> SkipCache:
        """Have the object `other` be this cache from now on, whoever holds it; returns it.

        This one is left empty.
        """
        storage, self._storage = self._storage, None
        if self._acquired is not None:
            self._acquired.detach()
        other.__dict__ = {**vars(self), "_lease": None, "_staged": []}
        other.__class__ = SkipCache
        mine: SkipCache = other
        if storage is not None:
            mine._hold(storage)
        self.owner.track(mine)
        return mine

    def save(self, path: str | Path) -> None:
        """Write what is stored to the file `path`, for other processes that use the same prefix.

        ``load_cache(path)`` of the compiled model's ``.adaskip`` reads it. What was learned while
        decoding is not saved: the loaded request is at the beginning of a turn.
        """
        self.owner.save_cache(self, path)


def _refusing(name: str, words: str) -> Any:
    def refuse(self: SkipCache, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(words)

    refuse.__name__ = name
    refuse.__doc__ = "Refused; see `REFUSED`."
    return refuse


for _name, _words in REFUSED.items():
    setattr(SkipCache, _name, _refusing(_name, _words))
