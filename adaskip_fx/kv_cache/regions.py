"""Regions of keys and values: how they are made, and when heads lie apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from . import growing_memory
from .growing_memory import GrowingMemory
from .layer_spec import LayerCacheSpec
from .retention import Part, Retained, Retention, single_heads
from .token_layout import Pair, empty, gap, groups, widths

#: Numbers that a region may have, so that kernels count them in 32 bits.
_COUNTABLE = 2**31 - 1


@lru_cache(maxsize=64)
def takes_less_by_head(
    specs: tuple[LayerCacheSpec, ...],
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    block: int,
    retention: Retention,
) -> bool:
    """Return whether `tokens` tokens take less memory with each K/V head by itself.

    They can where a layer has heads that forget beside others that don't; and they do from some
    length on, since each head has whole blocks of `block` bytes. The rest is as of `new_regions`.
    """
    if all(len({kept is None for kept in heads}) < 2 for heads in retention):
        return False

    def held(by_head: bool) -> int:
        parts = _sized_parts(specs, by_head, batch * dtype.itemsize)
        return sum(_held(part.of(retention), tokens, size, block) for part, size in parts)

    return held(True) < held(False)


def _held(kept: Retained | None, tokens: int, size: int, block: int) -> int:
    """Return in how many blocks a part holds what it is to hold of tokens of `size` bytes."""
    every = -(-tokens * size // block)
    gone = range(0) if kept is None else kept.gone(tokens)
    if not gone:
        return every
    first = max(1, -(-gone.start * size // block))
    return min(every, first + every - gone.stop * size // block)


def parts_of(layer: int, spec: LayerCacheSpec, by_head: bool) -> tuple[list[Part], list[Part]]:
    """Return the parts of a layer whose memory lies apart, in order: of its keys, of its values."""
    if not spec.attends:
        return [], []
    if by_head:
        return single_heads(layer, spec.key_heads), single_heads(layer, spec.value_heads)
    return [Part(layer, 0, spec.key_heads)], [Part(layer, 0, spec.key_heads)]


def _sized_parts(
    specs: Sequence[LayerCacheSpec], by_head: bool, itemsize: int
) -> Iterator[tuple[Part, int]]:
    """Yield the parts of all layers with the bytes of a token of one row, as memory has them."""
    for layer, spec in enumerate(specs):
        pairs = zip(parts_of(layer, spec, by_head), widths(spec, by_head), strict=True)
        yield from ((part, width * itemsize) for parts, width in pairs for part in parts)


def new_regions(
    specs: Sequence[LayerCacheSpec],
    batch: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device,
    longest: int | None,
    retention: Retention,
    by_head: bool,
) -> tuple[GrowingMemory | None, list[Pair | None]]:
    """Return the regions [groups, room, batch, width] of each layer that attends, and their memory.

    Args:
        specs: what is stored of each layer.
        batch: rows.
        capacity: tokens to have memory for; of parts that forget the first block has memory.
        dtype: of keys and values.
        device: where.
        longest: tokens that they are to grow to in place, where the device can; None: they stay.
        retention: what is to be held.
        by_head: whether each head is a group of its own.
    """
    attends = any(spec.attends for spec in specs)
    if longest and attends and growing_memory.is_worth_it(device, any(retention)):
        room = _room(specs, batch, capacity, longest, dtype, device, by_head)
        form = dtype, device, retention, by_head
        return _growing(specs, batch, capacity, room, *form)
    plain = capacity + gap(by_head), batch, dtype, device, by_head
    return None, [empty(spec, *plain) if spec.attends else None for spec in specs]


def _room(
    specs: Sequence[LayerCacheSpec],
    batch: int,
    capacity: int,
    longest: int,
    dtype: torch.dtype,
    device: torch.device,
    by_head: bool,
) -> int:
    """Return how many tokens to have addresses for: `capacity`, `longest` if possible, and a gap.

    By head that many tokens of a head are whole blocks, in every layer: heads lie side by side.
    """
    widest = max(max(widths(spec)) for spec in specs if spec.attends)
    room = max(capacity, min(longest, _COUNTABLE // (batch * widest)))
    if not by_head:
        return room
    block = growing_memory.block_of(device)
    sizes = (batch * size for _, size in _sized_parts(specs, by_head, dtype.itemsize))
    whole = block // math.gcd(block, *sizes)
    return -(-(room + gap(by_head)) // whole) * whole


def _growing(
    specs: Sequence[LayerCacheSpec],
    batch: int,
    capacity: int,
    room: int,
    dtype: torch.dtype,
    device: torch.device,
    retention: Retention,
    by_head: bool,
) -> tuple[GrowingMemory, list[Pair | None]]:
    """Return what `new_regions` does in memory with addresses for `room` tokens."""
    parts = list(_sized_parts(specs, by_head, batch * dtype.itemsize))
    memory = GrowingMemory(device, [room * size for _, size in parts])
    memory.fit([1 if part.of(retention) else capacity * size for part, size in parts])
    ranges = iter(range(len(parts)))
    form = room, batch, dtype, by_head
    return memory, [
        _regions(memory, ranges, spec, *form) if spec.attends else None for spec in specs
    ]


def _regions(
    memory: GrowingMemory,
    ranges: Iterator[int],
    spec: LayerCacheSpec,
    room: int,
    batch: int,
    dtype: torch.dtype,
    by_head: bool,
) -> Pair:
    """Return the next ranges of memory as regions of a layer."""

    def region(apart: int, width: int) -> torch.Tensor:
        first, *_ = (next(ranges) for _ in range(apart))
        size = apart * room * batch * width * dtype.itemsize
        flat = memory.tensor(first, apart).narrow(0, 0, size)
        return flat.view(dtype).view(apart, room, batch, width)

    pairs = zip(groups(spec, by_head), widths(spec, by_head), strict=True)
    return Pair(*(region(apart, width) for apart, width in pairs))
