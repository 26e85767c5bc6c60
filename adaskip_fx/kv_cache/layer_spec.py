"""What one layer of a model stores of a request: keys and values, states of mixers, or nothing."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch

StateKind = Literal["conv", "recurrent"]


@dataclass(frozen=True)
class State:
    """One state that a mixer keeps instead of keys and values; its size does not grow with tokens.

    Attributes:
        kind: ``conv`` (the last inputs of a convolution) or ``recurrent``.
        index: which of the layer's states of that kind.
        shape: without the batch: [*shape], of a batch [B, *shape].
        dtype: the state's own, which may be wider than the model's.
    """

    kind: StateKind
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def zeros(self, batch: int, device: torch.device | str) -> torch.Tensor:
        """Return a state with nothing in it, [batch, *shape]."""
        return torch.zeros((batch, *self.shape), dtype=self.dtype, device=device)


@dataclass(frozen=True)
class LayerCacheSpec:
    """What one layer stores: heads and dimension of its keys and of its values, and its states.

    A layer may have either, both or none (where it reads another layer's, or has only an FFN).

    Attributes:
        key_heads, key_dim: heads and dimension of a head's keys; 0 without attention.
        value_heads, value_dim: likewise of its values.
        states: of its mixer.
    """

    key_heads: int = 0
    key_dim: int = 0
    value_heads: int = 0
    value_dim: int = 0
    states: tuple[State, ...] = ()

    @property
    def attends(self) -> bool:
        """Whether there are keys and values."""
        return self.key_heads > 0

    @property
    def mixes(self) -> bool:
        """Whether there are states."""
        return bool(self.states)

    def nbytes(self, batch: int, tokens: int, itemsize: int) -> int:
        """Return the bytes of K and V for `tokens` tokens, and of the states."""
        width = self.key_heads * self.key_dim + self.value_heads * self.value_dim
        states = sum(math.prod(s.shape) * s.dtype.itemsize for s in self.states)
        return batch * (tokens * width * itemsize + states)

    def only(self, kinds: Collection[str]) -> LayerCacheSpec:
        """Return what is stored for `kinds`: attention's keys and values, a mixer's states."""
        states = self.states if "mixer" in kinds else ()
        return (
            replace(self, states=states) if "attention" in kinds else LayerCacheSpec(states=states)
        )
