"""What a request remembers: K/V buffers and states, leased to one request at a time.

A captured CUDA graph holds the addresses of the buffers it works on. Where graphs are recorded,
the buffers of a request that has ended are therefore kept for the next one, with the graphs that
were recorded on them.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from ..runtime.static_step import StaticDecodeStep

StateKind = Literal["conv", "recurrent"]


@dataclass(frozen=True)
class State:
    """One state that a mixer keeps instead of keys and values; as long for any number of tokens.

    Attributes:
        kind: ``conv`` (the last inputs of a convolution) or ``recurrent``.
        index: which of the layer's states of that kind.
        shape: without the batch: [*shape], of a batch [B, *shape].
        dtype: its own, which may be wider than the model's.
    """

    kind: StateKind
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def zeros(self, batch: int, device: torch.device | str) -> torch.Tensor:
        return torch.zeros((batch, *self.shape), dtype=self.dtype, device=device)


@dataclass(frozen=True)
class LayerCacheSpec:
    """What one layer stores: heads and dimension of its keys and of its values, and its states.

    A layer may have either, both or none (where it reads another layer's, or has only an FFN).
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
        """Bytes of K and V for `tokens` tokens, and of the states."""
        width = self.key_heads * self.key_dim + self.value_heads * self.value_dim
        states = sum(math.prod(s.shape) * s.dtype.itemsize for s in self.states)
        return batch * (tokens * width * itemsize + states)

    def only(self, kinds: Collection[str]) -> LayerCacheSpec:
        """What is stored of it: keys and values (attention), states (mixer), both or nothing."""
        states = self.states if "mixer" in kinds else ()
        return (
            replace(self, states=states) if "attention" in kinds else LayerCacheSpec(states=states)
        )


@dataclass(eq=False)
class CacheBuffers:
    """Buffers of every layer whose attention or mixer runs.

    Attributes:
        batch: rows.
        capacity: tokens.
        dtype, device: of keys and values.
        slots: what is stored, by layer.
        keys, values: [batch, heads, capacity, dim] by layer; None where nothing is stored.
        states: by layer, in the order of its slot's states.
        lengths: a tensor on the CPU of which only lengths are used.
        decoder: the decode steps that run on these buffers on a static cache, once there are any.
        stream: that the steps of the request run on, on a GPU.
        shown: whether somebody was handed a view of a buffer, who may hold it for longer than the
            request lives: nothing that it shows is overwritten, and no other request gets it.
    """

    batch: int
    capacity: int
    dtype: torch.dtype
    device: torch.device
    slots: tuple[LayerCacheSpec, ...]
    keys: list[torch.Tensor | None]
    values: list[torch.Tensor | None]
    states: list[tuple[torch.Tensor, ...]]
    lengths: torch.Tensor
    decoder: StaticDecodeStep | None = field(default=None, repr=False)
    stream: torch.cuda.Stream | None = field(default=None, repr=False)
    shown: bool = False

    @classmethod
    def zeros(
        cls,
        slots: Sequence[LayerCacheSpec],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> CacheBuffers:
        """Storage with nothing in it.

        Zeros, because a masked attention reads what was never written, and NaN times 0 is NaN.
        """

        def made(heads: int, dim: int) -> torch.Tensor | None:
            size = (batch, heads, capacity, dim)
            return torch.zeros(size, dtype=dtype, device=device) if heads else None

        # not inference tensors: they may be written outside inference mode later
        with torch.inference_mode(False):
            return cls(
                batch,
                capacity,
                dtype,
                device,
                tuple(slots),
                keys=[made(s.key_heads, s.key_dim) for s in slots],
                values=[made(s.value_heads, s.value_dim) for s in slots],
                states=[tuple(one.zeros(batch, device) for one in s.states) for s in slots],
                lengths=torch.empty(capacity, dtype=torch.int8, device="cpu"),
            )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tensors())

    def _tensors(self) -> list[torch.Tensor]:
        return [*self._kv(), *self._states()]

    def _kv(self) -> list[torch.Tensor]:
        return [t for t in (*self.keys, *self.values) if t is not None]

    def _states(self) -> list[torch.Tensor]:
        return [*itertools.chain.from_iterable(self.states)]

    def layer(
        self, index: int, slot: LayerCacheSpec, absent: Callable[[int, int], torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """Keys, values and states of a layer; where they are not stored, surrogates for them.

        Args:
            index: of the layer.
            slot: what the layer has.
            absent: makes the surrogate for keys or values, of so many heads of such a dimension.
        """
        keys, values, states = self.keys[index], self.values[index], self.states[index]
        if slot.attends and keys is None:
            keys = absent(slot.key_heads, slot.key_dim)
            values = absent(slot.value_heads, slot.value_dim)
        if slot.mixes and not states:
            states = tuple(one.zeros(self.batch, "meta") for one in slot.states)
        return keys, values, states

    def take(self, other: CacheBuffers, tokens: int) -> None:
        """Copy states, and the first `tokens` tokens, of `other`, which stores the same."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            if mine.shape == theirs.shape:
                mine.copy_(theirs)
            else:
                mine.narrow(2, 0, tokens).copy_(theirs.narrow(2, 0, tokens))

    def take_rows(self, other: CacheBuffers, rows: torch.Tensor, tokens: int) -> None:
        """Copy states, and the first `tokens` tokens, of the given rows of `other`.

        Args:
            other: stores the same of another batch; may be this storage itself.
            rows: int64 [batch of this storage], on the CPU.
            tokens: of each row.
        """
        index = rows.to(self.device)
        for mine, theirs in zip(self._kv(), other._kv(), strict=True):
            mine.narrow(2, 0, tokens).copy_(theirs.narrow(2, 0, tokens).index_select(0, index))
        for mine, theirs in zip(self._states(), other._states(), strict=True):
            mine.copy_(theirs.index_select(0, index))

    def use_here(self) -> None:
        """Steps run on the caller's stream from now on; it waits for those on another one."""
        if self.device.type != "cuda":
            return
        current = torch.cuda.current_stream(self.device)
        if self.stream is not None and self.stream != current:
            current.wait_stream(self.stream)
            for tensor in self._tensors():  # freed only when this stream is through as well
                tensor.record_stream(current)
        self.stream = current

    def clear(self) -> None:
        """Forget what an earlier request left."""
        for tensor in self._tensors():
            tensor.zero_()

    def copy(self) -> CacheBuffers:
        """Buffers of their own with the same content."""
        # not inference tensors, as in `zeros`
        with torch.inference_mode(False):
            keys, values = (
                [None if t is None else t.clone() for t in group]
                for group in (self.keys, self.values)
            )
            states = [tuple(t.clone() for t in group) for group in self.states]
        return replace(self, keys=keys, values=values, states=states, decoder=None, shown=False)


class BufferPool:
    """Makes storages, and keeps the last one that came back if `keep` says so.

    One is kept, not more: the next request is likely to be like the last one, and memory that
    nobody uses is worth more elsewhere.

    Requests of several threads acquire from one pool, and a storage comes back in a finalizer: in
    any thread, in the middle of a collection of garbage, also of one that an allocation in
    `acquire` set off. A lock would wait for itself there. What is kept is therefore in a deque: no
    other thread and no finalizer can come between its single operations.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._kept: deque[CacheBuffers] = deque(maxlen=1)

    @property
    def idle(self) -> CacheBuffers | None:
        """What is kept for a next request, to be looked at."""
        try:
            return self._kept[-1]
        except IndexError:
            return None

    @property
    def idle_bytes(self) -> int:
        """Bytes held for a next request."""
        idle = self.idle
        return idle.nbytes if idle is not None else 0

    def acquire(
        self,
        slots: Sequence[LayerCacheSpec],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> CacheBuffers:
        """Storage for at least `capacity` tokens, all zeros; nobody else has it."""
        idle = self._taken()
        if (
            idle is not None
            and (idle.batch, idle.dtype, idle.device, idle.slots)
            == (batch, dtype, device, tuple(slots))
            and capacity <= idle.capacity <= 2 * capacity
        ):
            idle.use_here()
            idle.clear()
            return idle
        del idle  # before the new one is made
        made = CacheBuffers.zeros(slots, batch, capacity, dtype, device)
        made.use_here()
        return made

    def _taken(self) -> CacheBuffers | None:
        """What is kept, which is not kept any more."""
        try:
            return self._kept.pop()
        except IndexError:
            return None

    def release(self, storage: CacheBuffers) -> None:
        """Called when the request that leased `storage` is gone."""
        if self.keep and not storage.shown:
            self._kept.append(storage)

    def clear(self) -> None:
        """Free what is kept."""
        self._kept.clear()
