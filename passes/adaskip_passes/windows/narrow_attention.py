"""The operation that computes a piece's attention through a window, beside the one that it has."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from ..decode.ops import EVERY
from ..partition.outer import Piece
from .bounds import narrowed
from .find_attention import (
    BY_BOUNDS,
    CAUSAL,
    MASKED_WINDOWED,
    PACKED,
    PACKED_WINDOWED,
    WINDOWED,
    example_of,
    mask_of_torch,
)


def attend_in_window(piece: Piece, node: fx.Node, windows: fx.Node) -> fx.Node:
    """Return what attention gives through windows, laid out as `node`, before which it is put.

    Args:
        piece: What the graph was copied from.
        node: The attention, in a graph that can be changed; it stays there.
        windows: Sinks and tokens of each K/V head, int64 [H_kv, 2] on the CPU; where attention
            reads a table of bounds, [1, H_kv, 2] on its device.

    Raises:
        UnsupportedError: Attention is called with arguments that are not known.
    """
    graph = node.graph
    query, key, value, *more = node.args
    with graph.inserting_before(node):
        if node.target in BY_BOUNDS:
            every = graph.call_function(narrowed, (more[0], windows))
            target, given = (
                node.target,
                (graph.call_function(operator.getitem, (every, 0)), *more[1:]),
            )
        elif node.target is CAUSAL:
            target, given = WINDOWED, (windows, EVERY, *more)
        elif node.target is WINDOWED:
            target, given = WINDOWED, (windows, *more[1:])
        elif node.target is PACKED:
            offsets, *rest = more
            target, given = PACKED_WINDOWED, (offsets, windows, EVERY, *rest)
        elif node.target is PACKED_WINDOWED:
            offsets, _, *rest = more
            target, given = PACKED_WINDOWED, (offsets, windows, *rest)
        elif node.target is MASKED_WINDOWED:
            mask, _, *rest = more
            target, given = MASKED_WINDOWED, (mask, windows, *rest)
        else:
            target, given = _of_torch(piece, node, windows)
        new = graph.call_function(target, (query, key, value, *given))
        if node.target is scaled_dot_product_attention:
            new = graph.call_method("transpose", (new, 1, 2))
    return new


def heads_dimension(node: fx.Node) -> int:
    """Return which dimension of what attention gives counts the heads of its queries."""
    return 1 if node.target is scaled_dot_product_attention else 2


def _of_torch(piece: Piece, node: fx.Node, windows: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """Return the operator for what PyTorch's own attention does, and what it takes besides."""
    mask, scale = mask_of_torch(piece, node), node.kwargs.get("scale")
    scale = example_of(node.args[0]).shape[-1] ** -0.5 if scale is None else scale
    if mask is None:
        return WINDOWED, (windows, EVERY, scale)
    return MASKED_WINDOWED, (mask, windows, scale)
