"""The buffers of a request: keys, values and states of layers whose attention or mixer runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from .layer_spec import LayerCacheSpec

if TYPE_CHECKING:
    from ..runtime.static_step import StaticDecodeStep


@dataclass(eq=False)
class CacheBuffers:
    """Buffers of every layer whose attention or mixer runs.

    Attributes:
        batch: rows.
        capacity: tokens.
        dtype, device: of keys and values.
        specs: what is stored of each layer.
        keys, values: [batch, heads, capacity, dim] by layer; None where nothing is stored.
        states: by layer, in the order of the spec's states.
        lengths: a tensor on the CPU of which only lengths are used.
        decoder: the decode steps that run on these buffers on a static cache, once there are any.
        stream: the CUDA stream that the steps of the request run on, on a GPU.
        shown: whether somebody has a view of a buffer, and may hold it for longer than the
            request lives: nothing that it shows is overwritten, and no other request gets it.
    """

    batch: int
    capacity: int
    dtype: torch.dtype
    device: torch.device
    specs: tuple[LayerCacheSpec, ...]
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
        specs: Sequence[LayerCacheSpec],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> CacheBuffers:
        """Return buffers with nothing in them.

        They are zeros, because a masked attention reads what was never written, and NaN times 0 is
        NaN.
        """

        def buffer(heads: int, dim: int) -> torch.Tensor | None:
            size = (batch, heads, capacity, dim)
            return torch.zeros(size, dtype=dtype, device=device) if heads else None

        # not inference tensors: they may be written outside inference mode later
        with torch.inference_mode(False):
            return cls(
                batch,
                capacity,
                dtype,
                device,
                tuple(specs),
                keys=[buffer(s.key_heads, s.key_dim) for s in specs],
                values=[buffer(s.value_heads, s.value_dim) for s in specs],
                states=[tuple(state.zeros(batch, device) for state in s.states) for s in specs],
                lengths=torch.empty(capacity, dtype=torch.int8, device="cpu"),
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.nbytes for t in self._tensors())

    def _tensors(self) -> list[torch.Tensor]:
        return [*self._kv(), *self._states()]

    def _kv(self) -> list[torch.Tensor]:
        return [t for t in (*self.keys, *self.values) if t is not None]

    def _states(self) -> list[torch.Tensor]:
        return [*itertools.chain.from_iterable(self.states)]

    def layer(
        self, index: int, spec: LayerCacheSpec, absent: Callable[[int, int], torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """Return a layer's keys, values and states, or empty tensors where it stores none.

        Args:
            index: of the layer.
            spec: what the layer has.
            absent: called with a number of heads and a dimension, makes the tensor for keys or
                values that are not stored; it has no memory.
        """
        keys, values, states = self.keys[index], self.values[index], self.states[index]
        if spec.attends and keys is None:
            keys = absent(spec.key_heads, spec.key_dim)
            values = absent(spec.value_heads, spec.value_dim)
        if spec.mixes and not states:
            states = tuple(state.zeros(self.batch, "meta") for state in spec.states)
        return keys, values, states

    def take(self, other: CacheBuffers, tokens: int) -> None:
        """Copy states, and the first `tokens` tokens, of `other`, which stores the same."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            if mine.shape == theirs.shape:
                mine.copy_(theirs)
            else:
                mine.narrow(2, 0, tokens).copy_(theirs.narrow(2, 0, tokens))

    def take_rows(self, other: CacheBuffers, rows: torch.Tensor, tokens: int) -> None:
        """Copy states, and the first `tokens` tokens, of some rows of `other`.

        Args:
            other: stores the same of another batch; may be these buffers themselves.
            rows: int64 [batch of these buffers], on the CPU.
            tokens: of each row.
        """
        index = rows.to(self.device)
        for mine, theirs in zip(self._kv(), other._kv(), strict=True):
            mine.narrow(2, 0, tokens).copy_(theirs.narrow(2, 0, tokens).index_select(0, index))
        for mine, theirs in zip(self._states(), other._states(), strict=True):
            mine.copy_(theirs.index_select(0, index))

    def use_here(self) -> None:
        """Run steps on the caller's CUDA stream from now on; it waits for those on another one."""
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
        """Return new buffers with the same content."""
        # not inference tensors, as in `zeros`
        with torch.inference_mode(False):
            keys, values = (
                [None if t is None else t.clone() for t in group]
                for group in (self.keys, self.values)
            )
            states = [tuple(t.clone() for t in group) for group in self.states]
        return replace(self, keys=keys, values=values, states=states, decoder=None, shown=False)
