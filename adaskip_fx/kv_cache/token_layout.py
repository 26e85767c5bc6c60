"""How keys and values lie in memory: token by token, all rows of a token together.

A region of keys, or of values, is [groups, tokens, batch, width]: of all heads of a layer in one
group, or by head, in a group of its own each. Within a group a buffer grows at its end and nowhere
else, whatever its batch is, and tokens of all rows are one list of slots, which packed prompts are
written to.

In one group strides do not depend on how many tokens there is room for, so that a graph captured
on one serves all; and it has no gaps: where a compiler writes to a tensor with gaps and reads it
again, it may copy all of it. By head there are gaps, and the distance between heads is a number
that a graph takes as it takes lengths; in return a head's memory can be let go alone
(:mod:`.sliding`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .layer_spec import LayerCacheSpec


class Pair(NamedTuple):
    """Something of a layer's keys, and of its values."""

    keys: torch.Tensor
    values: torch.Tensor


def groups(spec: LayerCacheSpec, by_head: bool) -> tuple[int, int]:
    """Return how many groups of heads the keys of a layer have, and the values."""
    return (spec.key_heads, spec.value_heads) if by_head else (1, 1)


def gap(by_head: bool) -> int:
    """Return how many tokens of addresses are between two groups at least.

    Heads that lie apart never touch: where they do not in what a compiler has seen, it may say that
    its code is for no others.
    """
    return 1 if by_head else 0


def widths(spec: LayerCacheSpec, by_head: bool = False) -> tuple[int, int]:
    """Return how many numbers a group has of a token of one row: of keys, and of values."""
    if by_head:
        return spec.key_dim, spec.value_dim
    return spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim


def heads_of(regions: Pair, spec: LayerCacheSpec) -> Pair:
    """Return a layer's keys and values, [batch, heads, tokens, dim] each: views of its regions.

    Args:
        regions: [groups, tokens, batch, width] each.
        spec: of the layer.
    """
    dims = spec.key_dim, spec.value_dim
    return Pair(*(_heads(region, dim) for region, dim in zip(regions, dims, strict=True)))


def _heads(region: torch.Tensor, dim: int) -> torch.Tensor:
    apart, tokens, batch, width = region.shape
    heads = region.view(apart, tokens, batch, width // dim, dim).permute(2, 0, 3, 1, 4)
    return heads[:, 0] if apart == 1 else heads[:, :, 0]


def empty(
    spec: LayerCacheSpec,
    tokens: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str,
    by_head: bool = False,
) -> Pair:
    """Return regions with nothing in them, for a layer that attends."""
    pairs = zip(groups(spec, by_head), widths(spec, by_head), strict=True)
    shapes = ((apart, tokens, batch, width) for apart, width in pairs)
    return Pair(*(torch.empty(shape, dtype=dtype, device=device) for shape in shapes))
