"""What a step's graph sees of a request's K/V: views of the filled part, or the whole buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from adaskip_passes import Place, place_of

from .storage import Slot, Storage


class StepLayer:
    """One layer's keys and values during one step, [batch, heads, filled, dim]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values


class _SeenByStep(Cache):
    """What both have in common: plain attention layers, and no length of their own."""

    is_compileable = False
    is_sliding: Any = ()
    is_linear: Any = ()
    is_dummy: Any = ()

    def __init__(self, layers: Sequence[StepLayer]) -> None:
        super().__init__(layers=list(layers))
        self.is_sliding = self.is_linear = self.is_dummy = [False] * len(self.layers)

    def begin(self, tokens: int) -> None:
        """Called by a step of `tokens` new tokens before anything else."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not to be asked for: positions are always handed to the model."""
        raise RuntimeError("positions are inputs of a captured step, not read from its cache")


class StepCache(_SeenByStep):
    """What a step's graph sees of the cache: views of the filled length, new tokens at the end.

    Attributes:
        layers: one StepLayer per decoder layer; of a layer without storage, meta tensors.
        filled, new: tensors as long as the filled cache and as the new tokens; only their lengths
            are used (an integer attribute would be captured as a constant).
        fresh: True in prefill, when the new tokens are all there is: attention then reads the
            fresh keys and values instead of the stored ones.
    """

    def __init__(
        self, layers: Sequence[StepLayer], filled: torch.Tensor, new: torch.Tensor, fresh: bool
    ) -> None:
        super().__init__(layers)
        self.filled = filled
        self.new = new
        self.fresh = fresh

    def begin(self, tokens: int) -> None:
        """Tell the tracer that `tokens` are new, and in prefill that no others are filled."""
        if self.new.shape[0] != tokens or (self.fresh and tokens != self.filled.shape[0]):
            raise ValueError(f"{tokens} tokens for a step of {self.new.shape[0]}")

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int | Place,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [B, H, T, D]; returns what attention reads."""
        layer, tokens = self.layers[place_of(layer_idx)], key_states.shape[2]
        total = self.filled.shape[0]
        if layer.keys.shape[2] != total or layer.values.shape[2] != total:  # told to the tracer
            raise ValueError("layers of one cache have different lengths")
        start = total - tokens
        layer.keys.narrow(2, start, tokens).copy_(key_states)
        layer.values.narrow(2, start, tokens).copy_(value_states)
        if self.fresh:
            return key_states, value_states
        return layer.keys, layer.values

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first query in prefill; later ones are never maskless by position."""
        if self.fresh:
            return 0
        return self.filled.shape[0] - self.new.shape[0]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that attention reads."""
        return self.filled.shape[0], 0


class WholeCache(_SeenByStep):
    """What a decode step at fixed addresses sees: whole buffers, and the position on the device.

    Attributes:
        layers: one StepLayer per decoder layer, [batch, heads, capacity, dim]; of a layer without
            storage, meta tensors.
        position: where the new token goes, int64 [1].
    """

    def __init__(self, layers: Sequence[StepLayer], position: torch.Tensor) -> None:
        super().__init__(layers)
        self.position = position

    @classmethod
    def of(
        cls, storage: Storage, slots: Sequence[Slot], position: torch.Tensor, dtype: torch.dtype
    ) -> WholeCache:
        """All of a storage's buffers."""

        def buffer(held: torch.Tensor | None, heads: int, dim: int) -> torch.Tensor:
            if held is not None:
                return held
            size = (storage.batch, heads, storage.capacity, dim)
            return torch.empty(size, dtype=dtype, device="meta")

        rows = zip(slots, storage.keys, storage.values, strict=True)
        layers = [
            StepLayer(buffer(k, s.key_heads, s.key_dim), buffer(v, s.value_heads, s.value_dim))
            for s, k, v in rows
        ]
        return cls(layers, position)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int | Place,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token's keys and values [B, H, 1, D]; returns the whole buffers."""
        layer, capacity = self.layers[place_of(layer_idx)], self.layers[0].keys.shape[2]
        if layer.keys.shape[2] != capacity or layer.values.shape[2] != capacity:
            raise ValueError("layers of one cache have different capacities")
        layer.keys.index_copy_(2, self.position, key_states)
        layer.values.index_copy_(2, self.position, value_states)
        return layer.keys, layer.values

    def get_query_offset(self, layer_idx: int = 0) -> torch.Tensor:
        """Position of the new token, on the device."""
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that attention is handed."""
        return self.layers[0].keys.shape[2], 0
