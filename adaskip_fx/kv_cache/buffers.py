"""The buffers of a request: keys, values and states of layers whose attention or mixer runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

import torch

from . import growing_memory
from .growing_memory import GrowingMemory
from .layer_spec import LayerCacheSpec
from .regions import growing_regions
from .retention import Retention
from .sliding import Sliding
from .token_layout import Pair, by_head, empty, widths

if TYPE_CHECKING:
    from ..runtime.static_step import StaticStep

#: Numbers that a region may have, so that kernels count them in 32 bits.
_COUNTABLE = 2**31 - 1
#: Ranges of memory that are extended between two tokens.
_AT_A_TIME = 8


@dataclass(eq=False)
class CacheBuffers:
    """Buffers of every layer whose attention or mixer runs.

    Attributes:
        batch: rows.
        capacity: tokens that there is memory for.
        dtype, device: of keys and values.
        specs: what is stored of each layer.
        regions: of keys and values [room, batch, width] by layer (see :mod:`.token_layout`); None
            where nothing is stored. There are addresses for all `room` tokens, and memory for
            `capacity`.
        states: by layer, in the order of the spec's states.
        memory: what the regions are in, if they can grow in place.
        whole: whether all of them may be read, filled or not.
        sliding: the layers that forget.
        lengths: a tensor on the CPU of which only lengths are used, int8 [room].
        keys, values: [batch, heads, room, dim] by layer: views of the regions.
        steps: those that run on these buffers on a static cache, by their number of new tokens.
        stream: the CUDA stream that the steps of the request run on, on a GPU.
        shown: whether somebody has a view of a buffer, and may hold it for longer than the
            request lives: nothing that it shows is overwritten, and no other request gets it.
    """

    batch: int
    capacity: int
    dtype: torch.dtype
    device: torch.device
    specs: tuple[LayerCacheSpec, ...]
    regions: list[Pair | None] = field(repr=False)  # (there may be no memory behind them)
    states: list[tuple[torch.Tensor, ...]] = field(repr=False)
    memory: GrowingMemory | None
    whole: bool = False
    retention: InitVar[Retention] = ()
    sliding: Sliding = field(init=False, repr=False)
    lengths: torch.Tensor = field(init=False, repr=False)
    keys: list[torch.Tensor | None] = field(init=False, repr=False)
    values: list[torch.Tensor | None] = field(init=False, repr=False)
    steps: dict[int, StaticStep] = field(init=False, default_factory=dict, repr=False)
    stream: torch.cuda.Stream | None = field(init=False, default=None, repr=False)
    shown: bool = field(init=False, default=False)

    def __post_init__(self, retention: Retention) -> None:
        pairs = [
            (None, None) if regions is None else by_head(regions, spec)
            for regions, spec in zip(self.regions, self.specs, strict=True)
        ]
        self.keys, self.values = [k for k, _ in pairs], [v for _, v in pairs]
        self.lengths = torch.empty(self.room, dtype=torch.int8, device="cpu")
        sizes = iter(enumerate(r.stride(0) * r.itemsize for r in self._regions()))
        attending = [i for i, regions in enumerate(self.regions) if regions is not None]
        ranges = {i: (next(sizes), next(sizes)) for i in attending}
        self.sliding = Sliding(self.memory, ranges, retention)

    @classmethod
    def new(
        cls,
        specs: Sequence[LayerCacheSpec],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        longest: int | None = None,
        whole: bool = False,
        retention: Retention = (),
    ) -> CacheBuffers:
        """Return buffers with nothing in them: states are zeros, keys and values are anything.

        Nothing reads a token that was not written, but what reads whole buffers with a mask. (NaN
        times 0 is NaN.)

        Args:
            specs: what to store of each layer.
            batch: rows.
            capacity: tokens to have memory for.
            dtype: of keys and values.
            device: where.
            longest: tokens that the buffers are to grow to in place, where the device can.
            whole: whether keys and values are zeros, and are moved to grow, since all is read.
            retention: what is to be held of each layer, if not all.
        """
        memory = None
        # not inference tensors: they may be written outside inference mode later
        with torch.inference_mode(False):
            widest = batch * max((max(widths(s)) for s in specs if s.attends), default=0)
            if longest and not whole and widest and growing_memory.is_available(device):
                room = max(capacity, min(longest, _COUNTABLE // widest))
                memory, regions = growing_regions(
                    specs, batch, capacity, room, dtype, device, retention
                )
            else:
                regions = [
                    empty(s, capacity, batch, dtype, device) if s.attends else None for s in specs
                ]
            states = [tuple(state.zeros(batch, device) for state in s.states) for s in specs]
        form = tuple(specs), regions, states, memory, whole, retention
        made = cls(batch, capacity, dtype, device, *form)
        made.clear()
        if memory is not None:
            made._count(memory)
        return made

    @property
    def room(self) -> int:
        """Tokens that there are addresses for."""
        return next((r.keys.shape[0] for r in self.regions if r is not None), self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all buffers."""
        stored = (
            sum(r.nbytes for r in self._regions()) if self.memory is None else self.memory.nbytes
        )
        return stored + sum(t.nbytes for t in self._states())

    def parts(self) -> dict[int, int]:
        """Return its bytes by identity, for the budget."""
        return {id(self): self.nbytes}

    def fit(self, capacity: int) -> bool:
        """Have memory for `capacity` tokens where they are; returns whether that can be."""
        if self.memory is not None and self.capacity < capacity <= self.room:
            self.memory.fit(self._sizes(capacity))
            self._count(self.memory)
        return self.capacity >= capacity

    def grow_ahead(self, capacity: int) -> None:
        """Come nearer to memory for `capacity` tokens, if these buffers grow where they are.

        A few calls do it all: one alone would be seen as a pause between two tokens.
        """
        if self.memory is not None:
            self.memory.fit(self._sizes(min(capacity, self.room)), most=_AT_A_TIME)
            self._count(self.memory)

    def fit_anew(self, capacity: int, retention: Retention) -> bool:
        """Do what `fit` does for another request: content is lost, and so is memory to spare."""
        self.sliding.begin(retention)
        if self.memory is None:
            return capacity <= self.capacity <= 2 * capacity
        self._count(self.memory)
        if self.memory.spares(self._sizes(capacity, every=True)):
            try:
                self.memory.trim(self._sizes(capacity))
            finally:  # there is less than before, also without room for what is wanted
                self._count(self.memory)
        return self.fit(capacity)

    def _sizes(self, tokens: int, every: bool = False) -> list[int]:
        """Return the bytes of so many tokens by region, of layers that forget if `every`."""
        sizes = enumerate(r.stride(0) * r.itemsize * tokens for r in self._regions())
        return [size if every or not self.sliding.has(i) else 0 for i, size in sizes]

    def _count(self, memory: GrowingMemory) -> None:
        """Count the tokens that there is memory for now: it comes in blocks."""
        pairs = zip(memory.filled, self._sizes(1), strict=True)
        self.capacity = min([self.room, *(filled // size for filled, size in pairs if size)])

    def _regions(self) -> list[torch.Tensor]:
        return [region for pair in self.regions if pair is not None for region in pair]

    def _states(self) -> list[torch.Tensor]:
        return [*itertools.chain.from_iterable(self.states)]

    def _stored(self, tokens: int) -> list[torch.Tensor]:
        """Return the first `tokens` tokens of each region."""
        return [r.narrow(0, 0, tokens) for r in self._regions()]

    def layer(
        self, index: int, spec: LayerCacheSpec, tokens: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """Return a layer's keys and values of the first tokens, and its states.

        What it does not store are tensors that have no memory, in the same form.

        Args:
            index: of the layer.
            spec: what the layer has.
            tokens: how many.
        """
        keys, values, states = self.keys[index], self.values[index], self.states[index]
        if spec.attends:
            if keys is None or values is None:
                keys, values = by_head(empty(spec, tokens, self.batch, self.dtype, "meta"), spec)
            else:
                keys, values = keys.narrow(2, 0, tokens), values.narrow(2, 0, tokens)
        if spec.mixes and not states:
            states = tuple(state.zeros(self.batch, "meta") for state in spec.states)
        return keys, values, states

    def flat_layer(
        self, index: int, spec: LayerCacheSpec, tokens: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return what `layer` does, as one row [1, heads, tokens * batch, dim], without states."""
        if not spec.attends:
            return None, None
        regions, slots = self.regions[index], tokens * self.batch
        if regions is None:
            return by_head(empty(spec, slots, 1, self.dtype, "meta"), spec)
        return by_head(Pair(*(r.narrow(0, 0, tokens).view(slots, 1, -1) for r in regions)), spec)

    def zero_first(self, tokens: int) -> None:
        """Write zeros as the first tokens of all rows: attention with a mask may read them."""
        for region in self._stored(tokens):
            region.zero_()

    def take(self, other: CacheBuffers, tokens: int) -> None:
        """Copy states, and what is held of the first `tokens` tokens, of the same of `other`."""
        self.sliding.slide(0, tokens, forget=False)
        for mine, theirs in self._held(other, tokens):
            mine.copy_(theirs)
        for mine, theirs in zip(self._states(), other._states(), strict=True):
            mine.copy_(theirs)
        self.sliding.forget(other.sliding.gone)

    def take_rows(self, other: CacheBuffers, rows: torch.Tensor, tokens: int) -> None:
        """Copy states, and what is held of the first `tokens` tokens, of some rows of `other`.

        Args:
            other: stores the same of another batch; may be these buffers themselves.
            rows: int64 [batch of these buffers], on the CPU.
            tokens: of each row.
        """
        index = rows.to(self.device)
        self.sliding.slide(0, tokens, forget=False)
        for mine, theirs in self._held(other, tokens):
            mine.copy_(theirs.index_select(1, index))
        for mine, theirs in zip(self._states(), other._states(), strict=True):
            mine.copy_(theirs.index_select(0, index))
        self.sliding.forget(other.sliding.gone)

    def _held(
        self, other: CacheBuffers, tokens: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the parts of each region that `other` holds: here, and there."""
        for layer, (mine, theirs) in enumerate(zip(self.regions, other.regions, strict=True)):
            if mine is not None and theirs is not None:
                for begin, count in other.sliding.parts(layer, tokens):
                    for pair in zip(mine, theirs, strict=True):
                        here, there = (r.narrow(0, begin, count) for r in pair)
                        yield here, there

    def use_here(self) -> None:
        """Run steps on the caller's CUDA stream from now on; it waits for those on another one."""
        if self.device.type != "cuda":
            return
        current = torch.cuda.current_stream(self.device)
        if self.stream is not None and self.stream != current:
            current.wait_stream(self.stream)
            for tensor in (*self._stored(self.capacity), *self._states()):
                tensor.record_stream(current)  # freed only when this stream is through as well
            for step in self.steps.values():
                step.use_here()
        self.stream = current

    def clear(self) -> None:
        """Forget the states of an earlier request, and its keys and values if all is read."""
        for tensor in (*self._states(), *(self._regions() if self.whole else ())):
            tensor.zero_()
