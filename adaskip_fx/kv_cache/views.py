"""The cache that a step's graph sees: views of the filled part of the buffers, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from adaskip_passes.decode.ops import store
from adaskip_passes.tracing.repeated_layers.match import LayerIndex, layer_index

from .buffers import CacheBuffers
from .layer_spec import LayerCacheSpec
from .token_layout import empty, heads_of


class LayerView(LinearAttentionCacheLayerMixin):
    """One layer's memory during one step, as models look it up.

    (A class of transformers', because models ask whether it is one before they read its states.)

    Attributes:
        keys, values: [batch, heads, filled, dim]; None where the layer keeps none.
        conv_states, recurrent_states: by index, [batch, ...].
    """

    def __init__(
        self,
        spec: LayerCacheSpec,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        states: Sequence[torch.Tensor],
    ) -> None:
        self.keys = keys
        self.values = values
        held = list(zip(spec.states, states, strict=True))
        self.conv_states = {s.index: tensor for s, tensor in held if s.kind == "conv"}
        self.recurrent_states = {s.index: tensor for s, tensor in held if s.kind == "recurrent"}
        self.record_past = False

    @classmethod
    def example(
        cls,
        spec: LayerCacheSpec,
        batch: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        by_head: bool = False,
    ) -> LayerView:
        """Return a layer of `tokens` tokens in the form in which buffers are."""
        keys = values = None
        if spec.attends:
            room = 2 * tokens if by_head else tokens  # so that heads lie apart
            regions = heads_of(empty(spec, room, batch, dtype, device, by_head), spec)
            keys, values = (stored.narrow(2, 0, tokens) for stored in regions)
        return cls(spec, keys, values, [s.zeros(batch, device) for s in spec.states])

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a step's memory is written through its cache")

    lazy_initialization = update_conv_state = update_recurrent_state = _refuse


class CacheView(Cache):
    """The base of both views: plain layers, and no length of their own."""

    is_compileable = False
    is_sliding: Any = ()
    is_linear: Any = ()
    is_dummy: Any = ()
    prefill = False

    def __init__(self, layers: Sequence[LayerView]) -> None:
        super().__init__(layers=list(layers))
        self.is_sliding = self.is_linear = self.is_dummy = [False] * len(self.layers)
        attending = (i for i, layer in enumerate(layers) if layer.keys is not None)
        self.first_attending = next(attending, None)

    def begin(self, tokens: int) -> None:
        """Begin a step of `tokens` new tokens; called before anything else."""

    def has_previous_state(self, layer_idx: Any = None, state_idx: int | None = None) -> bool:
        """Return whether states hold anything yet."""
        return not self.prefill

    def get_conv_state(
        self, layer_idx: int | LayerIndex, state_idx: int = 0
    ) -> torch.Tensor | None:
        """Return the last inputs of a convolution, or None in a prompt."""
        return None if self.prefill else self.layers[layer_index(layer_idx)].conv_states[state_idx]

    def get_recurrent_state(
        self, layer_idx: int | LayerIndex, state_idx: int = 0
    ) -> torch.Tensor | None:
        """Return a recurrent state, or None in a prompt."""
        if self.prefill:
            return None
        state: torch.Tensor = self.layers[layer_index(layer_idx)].recurrent_states[state_idx]
        return state

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int | LayerIndex,
        state_idx: int = 0,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Keep the last of a convolution's inputs [B, C, T]; returns all that it sees."""
        held = self.layers[layer_index(layer_idx)].conv_states[state_idx]
        before = torch.zeros_like(held) if self.prefill else held
        seen = torch.cat((before.to(conv_states.dtype), conv_states), -1)
        held.copy_(seen[..., -held.shape[-1] :])
        return conv_states if self.prefill else seen

    def update_recurrent_state(
        self,
        recurrent_states: torch.Tensor,
        layer_idx: int | LayerIndex,
        state_idx: int = 0,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Keep a recurrent state."""
        held: torch.Tensor = self.layers[layer_index(layer_idx)].recurrent_states[state_idx]
        held.copy_(recurrent_states)
        return held


class DynamicCacheView(CacheView):
    """Views of the filled length of the buffers, new tokens at the end.

    Attributes:
        layers: one `LayerView` per decoder layer; of a layer that stores nothing, meta tensors.
        filled, new: tensors as long as the filled cache and as the new tokens; only their lengths
            are used (an integer attribute would be captured as a constant).
        prefill: whether the new tokens are all there is: attention then reads the new keys and
            values instead of the stored ones.
    """

    def __init__(
        self, layers: Sequence[LayerView], filled: torch.Tensor, new: torch.Tensor, prefill: bool
    ) -> None:
        super().__init__(layers)
        self.filled = filled
        self.new = new
        self.prefill = prefill

    def begin(self, tokens: int) -> None:
        """Tell the tracer that `tokens` are new, and in prefill that no others are filled."""
        if self.new.shape[0] != tokens or (self.prefill and tokens != self.filled.shape[0]):
            raise ValueError(f"{tokens} tokens for a step of {self.new.shape[0]}")

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int | LayerIndex,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [B, H, T, D]; returns what attention reads."""
        layer, tokens = self.layers[layer_index(layer_idx)], key_states.shape[2]
        total = self.filled.shape[0]
        if layer.keys.shape[2] != total or layer.values.shape[2] != total:  # told to the tracer
            raise ValueError("layers of one cache have different lengths")
        _tell_rows(key_states, layer.keys, layer.values)
        start = total - tokens
        layer.keys.narrow(2, start, tokens).copy_(key_states)
        layer.values.narrow(2, start, tokens).copy_(value_states)
        if self.prefill:
            return key_states, value_states
        return layer.keys, layer.values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens stored before the new ones."""
        return 0 if self.prefill else self.filled.shape[0] - self.new.shape[0]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the first query; a constant in prefill: the mask is causal."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return length and offset of the keys that attention reads."""
        return self.filled.shape[0], 0


class StaticCacheView(CacheView):
    """Whole buffers, and the positions on the device, for steps on a static cache.

    What attention may read of a buffer is said by a table of bounds, also on the device: nothing
    else of a buffer need have memory behind it.

    Attributes:
        layers: one `LayerView` per decoder layer, [batch, heads, room, dim]; of a layer that
            stores nothing, meta tensors.
        position: where each row's first new token goes, int64 [B].
        first: each row's first token that is not padding, int64 [B].
        whole: whether a graph may read all of a buffer instead, as code does that makes masks of
            its own; there must be memory with numbers in it then, and no padding.
    """

    def __init__(
        self,
        layers: Sequence[LayerView],
        position: torch.Tensor,
        first: torch.Tensor,
        whole: bool = False,
    ) -> None:
        super().__init__(layers)
        self.position = position
        self.first = first
        self.whole = whole

    @classmethod
    def of(
        cls,
        buffers: CacheBuffers,
        specs: Sequence[LayerCacheSpec],
        position: torch.Tensor,
        first: torch.Tensor,
        whole: bool = False,
    ) -> StaticCacheView:
        """Return a view of `buffers`; `specs` say what layers have that store nothing in them."""
        room = buffers.room
        layers = [LayerView(spec, *buffers.layer(i, spec, room)) for i, spec in enumerate(specs)]
        return cls(layers, position, first, whole)

    @property
    def capacity(self) -> int:
        """Tokens that there are addresses for; 1 if nothing is stored."""
        first = self.first_attending
        room: int = self.layers[first].keys.shape[2] if first is not None else 1
        return room

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int | LayerIndex,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [B, H, T, D], each row's in its place; returns all buffers."""
        layer, capacity = self.layers[layer_index(layer_idx)], self.capacity
        if layer.keys.shape[2] != capacity or layer.values.shape[2] != capacity:
            raise ValueError("layers of one cache have different capacities")
        _tell_rows(key_states, layer.keys, layer.values, self.position)
        store(layer.keys, key_states, self.position)
        store(layer.values, value_states, self.position)
        return layer.keys, layer.values

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """Return how many tokens are stored before the new ones, on the device."""
        return self.position[:1]

    def get_query_offset(self, layer_idx: int = 0) -> torch.Tensor:
        """Return the position of each row's first new token, or of all rows', on the device."""
        return self.position[:1] if self.whole else self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, torch.Tensor | int]:
        """Return how many keys attention reads at most, and which key of each row is the first."""
        return self.capacity, 0 if self.whole else self.first


def _tell_rows(like: torch.Tensor, *others: torch.Tensor) -> None:
    """Tell the tracer that tensors have as many rows: a graph has one symbol for them then."""
    for other in others:
        if other.shape[0] != like.shape[0]:
            raise ValueError(f"{like.shape[0]} rows for a cache of {other.shape[0]}")
