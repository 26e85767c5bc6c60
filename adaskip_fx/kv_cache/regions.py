"""Regions of keys and values in memory that grows in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .growing_memory import GrowingMemory
from .layer_spec import LayerCacheSpec
from .retention import Retention
from .token_layout import Pair, widths


def growing_regions(
    specs: Sequence[LayerCacheSpec],
    batch: int,
    capacity: int,
    room: int,
    dtype: torch.dtype,
    device: torch.device,
    retention: Retention,
) -> tuple[GrowingMemory, list[Pair | None]]:
    """Return memory, and the regions [room, batch, width] of each layer that attends in it.

    Args:
        specs: what is stored of each layer.
        batch: rows.
        capacity: tokens to have memory for; of layers that forget the first block has memory.
        room: tokens to have addresses for.
        dtype: of keys and values.
        device: where.
        retention: which layers forget.
    """
    forgets = [bool(retention) and retention[i] is not None for i in range(len(specs))]
    sizes, needed = list[int](), list[int]()
    for spec, some in zip(specs, forgets, strict=True):
        for width in widths(spec) if spec.attends else ():
            token = width * batch * dtype.itemsize
            sizes.append(room * token)
            needed.append(1 if some else capacity * token)
    memory = GrowingMemory(device, sizes)
    memory.fit(needed)
    ranges = map(memory.tensor, range(len(sizes)))
    return memory, [_regions(ranges, spec, room, batch, dtype) for spec in specs]


def _regions(
    ranges: Iterator[torch.Tensor],
    spec: LayerCacheSpec,
    room: int,
    batch: int,
    dtype: torch.dtype,
) -> Pair | None:
    """Return the next two ranges of memory as regions of a layer that attends."""
    if not spec.attends:
        return None

    def region(width: int) -> torch.Tensor:
        size = room * batch * width * dtype.itemsize
        return next(ranges).narrow(0, 0, size).view(dtype).view(room, batch, width)

    return Pair(*(region(width) for width in widths(spec)))
