"""How keys and values lie in memory: token by token, all rows of a token together.

A region of keys, or of values, is [tokens, batch, heads * dim]. So a buffer grows at its end and
nowhere else, whatever its batch is; strides do not depend on how many tokens it has room for, so
that a graph captured on one serves all; and tokens of all rows are one list of slots, which packed
prompts are written to. It has no gaps: where a compiler writes to a tensor with gaps and reads it
again, it may copy all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .layer_spec import LayerCacheSpec


class Pair(NamedTuple):
    """Something of a layer's keys, and of its values."""

    keys: torch.Tensor
    values: torch.Tensor


def widths(spec: LayerCacheSpec) -> tuple[int, int]:
    """Return how many numbers a layer stores of a token of one row: in keys, and in values."""
    return spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim


def by_head(regions: Pair, spec: LayerCacheSpec) -> Pair:
    """Return a layer's keys and values, [batch, heads, tokens, dim] each: views of its regions.

    Args:
        regions: [tokens, batch, heads * dim] each.
        spec: of the layer.
    """
    shapes = (spec.key_heads, spec.key_dim), (spec.value_heads, spec.value_dim)
    pairs = zip(regions, shapes, strict=True)
    return Pair(*(r.view(*r.shape[:2], *shape).permute(1, 2, 0, 3) for r, shape in pairs))


def empty(
    spec: LayerCacheSpec,
    tokens: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Pair:
    """Return regions with nothing in them, for a layer that attends."""
    return Pair(
        *(torch.empty(tokens, batch, width, dtype=dtype, device=device) for width in widths(spec))
    )
