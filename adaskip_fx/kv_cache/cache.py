"""The cache of a compiled model: one request's memory, as transformers and its users see it.

It is what `DynamicCache()` of transformers is, and means the same, or refuses by name (`REFUSED`).
Like one that is made without a config it forgets no token outside of a model's sliding window, so
that it can be cropped; states of mixers are kept as by one with a config. What a plan's windows do
not show may be let go (:mod:`.sliding`), but for a few tokens that can be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .buffer_pool import BufferLease
from .drafting import Drafting
from .layer_spec import LayerCacheSpec
from .layers import layers_of
from .owner import Owner
from .pickled import as_dynamic_cache
from .request_memory import RequestMemory

_ONLY_COMPILED = (
    "this cache belongs to a compiled model, which stores only what its plan runs; the original "
    "model needs a cache of its own"
)
_STAYS = (
    "this cache cannot be offloaded: a compiled model's buffers stay on the model's device; leave "
    "offloading out"
)
#: Methods of transformers' `DynamicCache` that are refused, with the message of each.
REFUSED = {
    "update": _ONLY_COMPILED,  # called by a model's attention that was not captured with this cache
    "update_conv_state": _ONLY_COMPILED,
    "update_recurrent_state": _ONLY_COMPILED,
    "update_indexer": _ONLY_COMPILED,
    "offload": _STAYS,
    "prefetch": _STAYS,
    "early_initialization": (
        "this cache cannot be initialized by hand: its buffers are made with the first prompt; "
        "leave the call out, or say how much with new_cache(capacity=...)"
    ),
}


class SkipCache(RequestMemory, Cache):
    """The ``past_key_values`` of a model compiled by adaskip_fx; one request's memory.

    Attributes:
        prompting: whether the tokens that the model reads now are a prompt's, however many they are
            (see `prompt`).
        drafting: which of the tokens are decoded ones, while drafts are verified; else None.
    """

    is_compileable = False
    offloading = False
    layer_class_to_replicate = None  # as many layers as the model has, from the beginning

    def __init__(
        self,
        owner: Owner,
        specs: Sequence[LayerCacheSpec],
        kept: Sequence[LayerCacheSpec],
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = 0,
    ) -> None:
        # (transformers' own would make an attribute of `layers`, which is a property here)
        RequestMemory.__init__(self, owner, specs, kept, dtype, device, capacity)
        self.prompting = False
        self.drafting: Drafting | None = None

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Say that what the model reads with this cache meanwhile is a prompt, or a piece of one.

        A single token on a filled cache is otherwise taken for a decoded one, which runs under the
        plan for decoding. ``generate`` says so itself; your own loop that cuts prompts into pieces
        says it for the pieces that may have one token.
        """
        before, self.prompting = self.prompting, True
        try:
            yield
        finally:
            self.prompting = before

    @contextmanager
    def verifying(self, drafting: Drafting) -> Iterator[None]:
        """Say that tokens after the prompt are decoded ones meanwhile, however many at once."""
        before, self.drafting = self.drafting, drafting
        try:
            yield
        finally:
            self.drafting, drafting.ended = before, True

    def new_request(self) -> SkipCache:
        """Return an empty cache for the same request: it has its plan and its stop tokens."""
        other = self._empty()
        other.request = self.request.new_request(self.request.chosen)
        self.owner.track(other)
        return other

    def _empty(self) -> SkipCache:
        form = self.owner, self.specs, self.kept, self.dtype, self.device, self._at_once
        other = SkipCache(*form)
        other.expected, other.retention = self.expected, self.retention
        return other

    # Layers ----------------------------------------------------------------------------------

    @property
    def layers(self) -> list[Any]:
        """One object per layer of the model; see :mod:`adaskip_fx.kv_cache.layers`."""
        return layers_of(self)

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, None]]:
        """Yield keys and values of each layer, and no sliding window, as `DynamicCache` does.

        Raises:
            NotImplementedError: that is not all there is, so nothing could be made of it.
        """
        if self.stateful or self.kept != self.specs:
            raise NotImplementedError(
                "this cache is not keys and values of all layers: the plan skips attention, or "
                "mixers keep states; look at its layers one by one"
            )
        pairs = enumerate(zip(self.keys, self.values, strict=True))
        return ((self.filled(i, k), self.filled(i, v), None) for i, (k, v) in pairs)

    # What transformers asks of a cache -------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens stored; the same for every layer, whether its attention runs or not."""
        return self.length if layer_idx < len(self.specs) else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the next token."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return length and offset of the keys after `query_length` more tokens."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: the buffers grow."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows; -1 while nothing is stored."""
        return self.batch if self.length else -1

    @property
    def is_initialized(self) -> bool:
        """Whether there are keys and values; as in transformers, states alone do not count."""
        return self.length > 0 and any(spec.attends for spec in self.specs)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: always, but for states."""
        return not self.stateful

    @property
    def is_sliding(self) -> list[bool]:
        """Whether a layer forgets tokens outside of a window, by layer: none does."""
        return [False] * len(self.specs)

    @property
    def is_linear(self) -> list[bool]:
        """Whether a layer keeps states and nothing else, by layer."""
        return [spec.mixes and not spec.attends for spec in self.specs]

    def activate_past_recording(self) -> None:
        """Do nothing: tokens can be taken back anyway, but for states.

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
        """Forget everything; the buffers are kept for the next prompt."""
        self._unshare(0)
        self.length, self.padded = 0, False
        self.request = self.request.new_request()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on with the rows `beam_idx`, int64 [rows]."""
        if self.length:  # an empty cache has no rows yet
            self.keep_rows(self._rows().index_select(0, beam_idx.cpu()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with every row `repeats` times, one after the other."""
        if self.length:
            self.keep_rows(self._rows().repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Go on with some rows: whatever a tensor's first dimension can be indexed with."""
        if self.length:
            self.keep_rows(self._rows()[indices.cpu() if torch.is_tensor(indices) else indices])

    def _rows(self) -> torch.Tensor:
        return torch.arange(self.batch, device="cpu")

    def __len__(self) -> int:
        return len(self.specs)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        kept = sum(spec.attends or spec.mixes for spec in self.kept)
        return (
            f"SkipCache({self.length} tokens, {kept} of {len(self.specs)} layers stored, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    # Copies ----------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> SkipCache:
        """Return a second request with the same past (prefix caching); the buffers are copied."""
        twin = self._empty()
        twin.length, twin.padded = self.length, self.padded
        twin.copy_buffers(self)
        twin.request = self.request.copy()
        memo[id(self)] = twin
        self.owner.track(twin)
        return twin

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "this cache cannot be copied without its buffers, which belong to one request; use "
            "copy.deepcopy"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return DynamicCache, (), vars(as_dynamic_cache(self))

    def become(self, other: Cache) -> SkipCache:
        """Have the object `other` be this cache from now on, whoever holds it; returns it.

        This one is left empty.
        """
        other.__dict__ = dict(vars(self))
        other.__class__ = SkipCache
        self.lease = BufferLease(self.owner.buffer_pool)
        mine: SkipCache = other
        self.owner.track(mine)
        return mine

    def save(self, path: str | Path) -> None:
        """Write what is stored to the file `path`, for other processes that use the same prefix.

        ``load_cache(path)`` of the compiled model's ``.adaskip`` reads it. What was learned while
        decoding is not saved: the loaded request is at the beginning of a turn.
        """
        self.owner.save_cache(self, path)


def _refusing(name: str, message: str) -> Any:
    def refuse(self: SkipCache, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(message)

    refuse.__name__ = name
    refuse.__doc__ = "Refuse the call; see `REFUSED`."
    return refuse


for _name, _message in REFUSED.items():
    setattr(SkipCache, _name, _refusing(_name, _message))
