"""The buffers of a request: keys, values and states of layers whose attention or mixer runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

import torch

from .growing_memory import GrowingMemory
from .layer_spec import LayerCacheSpec
from .regions import new_regions, parts_of
from .retention import Part, Retention
from .sliding import Sliding
from .token_layout import Pair, empty, gap, heads_of

if TYPE_CHECKING:
    from ..runtime.static_step import StaticStep
    from .step_views import StepViews

#: Ranges of memory that are extended between two tokens, if that is a part of this of them.
_AT_A_TIME, _PART = 8, 32


@dataclass(eq=False)
class CacheBuffers:
    """Buffers of every layer whose attention or mixer runs.

    Attributes:
        batch: rows.
        capacity: tokens that there is memory for.
        dtype, device: of keys and values.
        specs: what is stored of each layer.
        regions: of keys and values [groups, room, batch, width] by layer (see
            :mod:`.token_layout`); None where nothing is stored. There are addresses for all `room`
            tokens, and memory for `capacity`.
        states: by layer, in the order of the spec's states.
        memory: what the regions are in, if they can grow in place.
        whole: whether all of them may be read, filled or not.
        by_head: whether the heads of a layer lie apart.
        sliding: the heads that forget.
        lengths: a tensor on the CPU of which only lengths are used, int8 [room].
        keys, values: [batch, heads, room, dim] by layer: views of the regions.
        steps: those that run on these buffers on a static cache, by their number of new tokens.
        views: what steps see that are handed views of the filled part.
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
    by_head: bool = False
    retention: InitVar[Retention] = ()
    sliding: Sliding = field(init=False, repr=False)
    lengths: torch.Tensor = field(init=False, repr=False)
    keys: list[torch.Tensor | None] = field(init=False, repr=False)
    values: list[torch.Tensor | None] = field(init=False, repr=False)
    steps: dict[int, StaticStep] = field(init=False, default_factory=dict, repr=False)
    views: StepViews | None = field(init=False, default=None, repr=False)
    stream: torch.cuda.Stream | None = field(init=False, default=None, repr=False)
    shown: bool = field(init=False, default=False)

    def __post_init__(self, retention: Retention) -> None:
        pairs = [
            (None, None) if regions is None else heads_of(regions, spec)
            for regions, spec in zip(self.regions, self.specs, strict=True)
        ]
        room = self.room
        self.keys = [None if k is None else k.narrow(2, 0, room) for k, _ in pairs]
        self.values = [None if v is None else v.narrow(2, 0, room) for _, v in pairs]
        self.lengths = torch.empty(self.room, dtype=torch.int8, device="cpu")
        ranges: dict[Part, list[tuple[int, int]]] = {}
        sizes = iter(enumerate(self._sizes(1, every=True)))
        for layer, (regions, spec) in enumerate(zip(self.regions, self.specs, strict=True)):
            for parts in parts_of(layer, spec, self.by_head) if regions is not None else ():
                for part in parts:
                    ranges.setdefault(part, []).append(next(sizes))
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
        by_head: bool = False,
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
            retention: what is to be held of each layer's heads, if not all.
            by_head: whether heads lie apart.
        """
        # not inference tensors: they may be written outside inference mode later
        with torch.inference_mode(False):
            form = dtype, device, None if whole else longest
            memory, regions = new_regions(specs, batch, capacity, *form, retention, by_head)
            states = [tuple(state.zeros(batch, device) for state in s.states) for s in specs]
        what = batch, capacity, dtype, device, tuple(specs)
        made = cls(*what, regions, states, memory, whole, by_head, retention)
        made.clear()
        if memory is not None:
            made._count(memory)
        return made

    @property
    def room(self) -> int:
        """Tokens that there are addresses for."""
        addresses = next((r.keys.shape[1] for r in self.regions if r is not None), None)
        return self.capacity if addresses is None else addresses - gap(self.by_head)

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
            needed = self._sizes(min(capacity, self.room))
            self.memory.fit(needed, most=max(_AT_A_TIME, len(needed) // _PART))
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
        """Return the bytes of so many tokens by range, of parts that forget if `every`."""
        regions = [(r.shape[0], r.stride(1) * r.itemsize * tokens) for r in self._regions()]
        sizes = enumerate(size for apart, size in regions for _ in range(apart))
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
        return [r.narrow(1, 0, tokens) for r in self._regions()]

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
                keys, values = heads_of(self._nothing(spec), spec)
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
        regions = self.regions[index] or self._nothing(spec)
        flat = (r.narrow(1, 0, tokens).flatten(1, 2).unsqueeze(2) for r in regions)
        return heads_of(Pair(*flat), spec)

    def _nothing(self, spec: LayerCacheSpec) -> Pair:
        """Return regions like those of a layer that is stored, without memory."""
        tokens = self.room + gap(self.by_head)
        return empty(spec, tokens, self.batch, self.dtype, "meta", self.by_head)

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
            mine.copy_(theirs.index_select(0, index))
        for mine, theirs in zip(self._states(), other._states(), strict=True):
            mine.copy_(theirs.index_select(0, index))
        self.sliding.forget(other.sliding.gone)

    def _held(
        self, other: CacheBuffers, tokens: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the parts of keys and values that `other` holds, [batch, ...]: here, and there."""
        for layer, spec in enumerate(self.specs):
            pieces = other.sliding.pieces(layer, spec.key_heads, tokens)
            sides = (self.keys, other.keys), (self.values, other.values)
            for mine, theirs in ((a[layer], b[layer]) for a, b in sides):
                if mine is not None and theirs is not None:
                    yield from ((p.cut(mine, held), p.cut(theirs, held)) for p, held in pieces)

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
