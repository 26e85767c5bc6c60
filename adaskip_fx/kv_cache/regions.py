"""Regions of keys and values in memory that grows in place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from . import growing_memory
from .growing_memory import GrowingMemory
from .layer_spec import LayerCacheSpec
from .retention import Part, Retained, Retention, single_heads
from .token_layout import Pair, groups, widths

#: Numbers that a region may have, so that kernels count them in 32 bits.
_COUNTABLE = 2**31 - 1


def room_of(
    specs: Sequence[LayerCacheSpec],
    batch: int,
    capacity: int,
    longest: int,
    dtype: torch.dtype,
    device: torch.device,
    by_head: bool,
) -> int:
    """Return how many tokens to have addresses for: `capacity` of them, and `longest` if possible.

    By head that many tokens of a head are whole blocks, in every layer: heads lie side by side.
    """
    widest = max(max(widths(spec)) for spec in specs if spec.attends)
    room = max(capacity, min(longest, _COUNTABLE // (batch * widest)))
    if not by_head:
        return room
    block, sizes = (
        growing_memory.block_of(device),
        [w for s in specs if s.attends for w in widths(s, True)],
    )
    whole = block // math.gcd(block, *(size * batch * dtype.itemsize for size in sizes))
    return -(-room // whole) * whole


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
    length on, since each head has whole blocks of `block` bytes. The rest is as of
    `growing_regions`.
    """
    if all(len({kept is None for kept in heads}) < 2 for heads in retention):
        return False

    def held(by_head: bool) -> int:
        return sum(
            _held(part.of(retention), tokens, width * batch * dtype.itemsize, block)
            for layer, spec in enumerate(specs)
            for width in (widths(spec, by_head) if spec.attends else ())
            for part in parts_of(layer, spec, by_head)
        )

    return held(True) < held(False)


def _held(kept: Retained | None, tokens: int, size: int, block: int) -> int:
    """Return in how many blocks a part holds what it is to hold of tokens of `size` bytes."""
    every = -(-tokens * size // block)
    gone = range(0) if kept is None else kept.gone(tokens)
    if not gone:
        return every
    first = max(1, -(-gone.start * size // block))
    return min(every, first + every - gone.stop * size // block)


def parts_of(layer: int, spec: LayerCacheSpec, by_head: bool) -> list[Part]:
    """Return the parts of a layer whose memory lies apart, in order: of keys as of values."""
    heads = spec.key_heads
    return single_heads(layer, heads) if by_head else [Part(layer, 0, heads)]


def growing_regions(
    specs: Sequence[LayerCacheSpec],
    batch: int,
    capacity: int,
    room: int,
    dtype: torch.dtype,
    device: torch.device,
    retention: Retention,
    by_head: bool,
) -> tuple[GrowingMemory, list[Pair | None]]:
    """Return memory, and the regions [groups, room, batch, width] of each layer that attends in it.

    Args:
        specs: what is stored of each layer.
        batch: rows.
        capacity: tokens to have memory for; of parts that forget the first block has memory.
        room: tokens to have addresses for, as `room_of` says.
        dtype: of keys and values.
        device: where.
        retention: what is to be held.
        by_head: whether each head is a group of its own.
    """
    sizes, needed = list[int](), list[int]()
    for layer, spec in enumerate(specs):
        for width in widths(spec, by_head) if spec.attends else ():
            token = width * batch * dtype.itemsize
            for part in parts_of(layer, spec, by_head):
                sizes.append(room * token)
                needed.append(1 if part.of(retention) is not None else capacity * token)
    memory = GrowingMemory(device, sizes)
    memory.fit(needed)
    ranges = iter(range(len(sizes)))
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
