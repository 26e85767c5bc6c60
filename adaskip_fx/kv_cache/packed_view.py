"""The cache that a packed prompt's graph sees: slots of all rows in one list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adaskip_passes.tracing.repeated_layers.match import LayerIndex, layer_index

from .buffers import CacheBuffers
from .layer_spec import LayerCacheSpec
from .views import CacheView, LayerView


class PackedCacheView(CacheView):
    """An empty cache for a prompt's rows without padding, one after the other in one row.

    Attributes:
        layers: one `LayerView` per decoder layer, [1, heads, tokens * rows, dim]: slots of all rows
            of a token lie together (see :mod:`.token_layout`).
        slots: where each token goes, int64 [N].
        offsets: where each row begins among the N, and N: int32 [rows + 1], on the CPU.
    """

    prefill = True

    def __init__(
        self, layers: Sequence[LayerView], slots: torch.Tensor, offsets: torch.Tensor
    ) -> None:
        super().__init__(layers)
        self.slots = slots
        self.offsets = offsets

    @classmethod
    def of(
        cls,
        buffers: CacheBuffers,
        specs: Sequence[LayerCacheSpec],
        tokens: int,
        slots: torch.Tensor,
        offsets: torch.Tensor,
    ) -> PackedCacheView:
        """Return a view of the first `tokens` tokens of `buffers`."""
        layers = [
            LayerView(spec, *buffers.flat_layer(i, spec, tokens), ())
            for i, spec in enumerate(specs)
        ]
        return cls(layers, slots, offsets)

    def begin(self, tokens: int) -> None:
        """Tell the tracer that every token has a slot."""
        if self.slots.shape[0] != tokens:
            raise ValueError(f"{tokens} tokens for {self.slots.shape[0]} slots")

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int | LayerIndex,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [1, H, N, D], each in its slot; returns the new ones."""
        layer = self.layers[layer_index(layer_idx)]
        layer.keys.index_copy_(2, self.slots, key_states)
        layer.values.index_copy_(2, self.slots, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: nothing is stored before a prompt."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return 0: the first query is the first token."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, torch.Tensor]:
        """Return how many keys there are, and in which of them rows begin."""
        return self.slots.shape[0], self.offsets
