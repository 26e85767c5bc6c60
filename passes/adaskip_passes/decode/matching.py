"""What the inner passes ask of a piece's node: which operation it is, of what, of what shape.

Nodes carry their example values.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from .. import _torch
from ..analysis.effects import is_mutation, operation, storage_root


def calls(node: fx.Node, *names: str) -> bool:
    """Return whether a node calls one of these operations, as a function or a method."""
    return node.op in ("call_function", "call_method") and operation(node) in names


def operands(node: fx.Node, name: str) -> list[tuple[fx.Node, fx.Node]]:
    """Return both operands of a binary operation, in both orders; empty when it is another one."""
    if not calls(node, name) or len(node.args) != 2 or node.kwargs:
        return []
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return []
    return [(a, b), (b, a)]


def argument(node: fx.Node, *names: str) -> fx.Node | None:
    """Return what a node calls one of these operations on; None if it calls another."""
    first = node.args[0] if node.args else None
    return first if calls(node, *names) and isinstance(first, fx.Node) else None


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the one node that uses another; None if there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def example(node: object) -> torch.Tensor | None:
    """Return a node's example value if it is a tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: fx.Node) -> torch.Size | None:
    """Return the shape of a node's example value."""
    value = example(node)
    return value.shape if value is not None else None


def most_rows(shape: torch.Size) -> int | None:
    """Return the largest number of vectors in a tensor of this shape; None without a limit."""
    return _torch.bounds_of(math.prod(shape[:-1]))[1]


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """Return the dtype of a node's example value."""
    value = example(node)
    return value.dtype if value is not None else None


def find_overwritten(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose memory something in the graph writes to in place."""
    roots = {storage_root(n) for n in graph.nodes if is_mutation(n)}
    return {n for n in graph.nodes if storage_root(n) in roots}


def two_parts(node: fx.Node, name: str = "cat") -> tuple[fx.Node, fx.Node] | None:
    """Return the two tensors that `node` is put together of along the last dimension."""
    if not calls(node, name):
        return None
    given = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    parts = given.pop("tensors", ())
    if given != {"dim": -1} or not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    first, second = parts
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    return first, second
