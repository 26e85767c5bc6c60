"""K/V buffers, leased to one request at a time.

A captured CUDA graph holds the addresses of the buffers it works on. Where graphs are recorded,
the buffers of a request that has ended are therefore kept for the next one, with the graphs that
were recorded on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .decoding import Decoder


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


@dataclass(eq=False)
class Storage:
    """Buffers [batch, heads, capacity, dim] of every layer whose attention runs.

    Attributes:
        batch: rows.
        capacity: tokens.
        keys, values: by layer; None where nothing is stored.
        lengths: a tensor on the CPU of which only lengths are used.
        decoder: the decode steps that run on these buffers at fixed addresses, once there are any.
    """

    batch: int
    capacity: int
    keys: list[torch.Tensor | None]
    values: list[torch.Tensor | None]
    lengths: torch.Tensor
    decoder: Decoder | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values) if t is not None)

    @property
    def stored(self) -> tuple[bool, ...]:
        """Which layers have storage."""
        return tuple(k is not None for k in self.keys)

    def take(self, other: Storage, tokens: int) -> None:
        """Copy the first `tokens` tokens of `other`, which stores the same layers."""
        pairs = (
            *zip(self.keys, other.keys, strict=True),
            *zip(self.values, other.values, strict=True),
        )
        for mine, theirs in pairs:
            if mine is not None and theirs is not None:
                mine.narrow(2, 0, tokens).copy_(theirs.narrow(2, 0, tokens))

    def clear(self) -> None:
        """Forget what an earlier request left."""
        for tensor in (*self.keys, *self.values):
            if tensor is not None:
                tensor.zero_()

    def copy(self) -> Storage:
        """Buffers of their own with the same content."""
        keys, values = (
            [None if t is None else t.clone() for t in group] for group in (self.keys, self.values)
        )
        return Storage(self.batch, self.capacity, keys, values, self.lengths)


class StoragePool:
    """Makes storages, and keeps the last one that came back if `keep` says so.

    One is kept, not more: the next request is likely to be like the last one, and memory that
    nobody uses is worth more elsewhere.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._idle: Storage | None = None

    @property
    def idle_bytes(self) -> int:
        """Bytes held for a next request."""
        return self._idle.nbytes if self._idle is not None else 0

    def lease(
        self,
        slots: Sequence[Slot],
        stored: Sequence[bool],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Storage:
        """Storage for at least `capacity` tokens, all zeros.

        Zeros, because a masked attention reads what was never written, and NaN times 0 is NaN.
        """
        idle, self._idle = self._idle, None
        if (
            idle is not None
            and (idle.batch, idle.stored) == (batch, tuple(stored))
            and capacity <= idle.capacity <= 2 * capacity
        ):
            idle.clear()
            return idle
        del idle  # before the new one is made
        # not inference tensors: they may be written outside inference mode later
        with torch.inference_mode(False):

            def made(there: bool, heads: int, dim: int) -> torch.Tensor | None:
                size = (batch, heads, capacity, dim)
                return torch.zeros(size, dtype=dtype, device=device) if there else None

            rows = list(zip(stored, slots, strict=True))
            return Storage(
                batch,
                capacity,
                keys=[made(there, s.key_heads, s.key_dim) for there, s in rows],
                values=[made(there, s.value_heads, s.value_dim) for there, s in rows],
                lengths=torch.empty(capacity, dtype=torch.int8),
            )

    def give_back(self, storage: Storage) -> None:
        """Called when the request that leased `storage` is gone."""
        if self.keep:
            self._idle = storage

    def clear(self) -> None:
        """Free what is kept."""
        self._idle = None
