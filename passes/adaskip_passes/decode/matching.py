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


def by_number(node: fx.Node, name: str) -> tuple[fx.Node | None, float]:
    """Return a tensor and the number that it is added to or multiplied by; else None, and 0."""
    if not calls(node, name) or len(node.args) != 2 or node.kwargs:
        return None, 0.0
    tensor, number = node.args if isinstance(node.args[0], fx.Node) else node.args[::-1]
    if not isinstance(tensor, fx.Node) or not isinstance(number, int | float):
        return None, 0.0
    return tensor, float(number)


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


def uncast(node: fx.Node) -> fx.Node:
    """Return what a node is before a change of dtype."""
    inner = argument(node, "to", "type", "type_as", "float")
    own, other = example(node), example(inner)
    if inner is None or own is None or other is None or own.device != other.device:
        return node
    return inner if own.shape == other.shape and other.is_floating_point() else node


def unwidened(node: fx.Node) -> fx.Node:
    """Return what a node is before it had a dtype that holds as much and more."""
    inner = uncast(node)
    one, other = dtype_of(inner), dtype_of(node)
    if one is None or other is None or torch.promote_types(one, other) != other:
        return node
    return inner


def find_overwritten(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose memory something in the graph writes to in place."""
    roots = {storage_root(n) for n in graph.nodes if is_mutation(n)}
    return {n for n in graph.nodes if storage_root(n) in roots}


def whole_of(first: fx.Node, second: fx.Node) -> fx.Node | None:
    """Return what two nodes are the halves of, along the last dimension; None if they are not."""
    one, other = argument(first, "getitem"), argument(second, "getitem")
    half = shape_of(first)
    if one is None or one is not other or half is None:
        return None
    if calls(one, "chunk"):
        given = {**dict(zip(("input", "chunks", "dim"), one.args, strict=False)), **one.kwargs}
        x = given.pop("input")
        both = (first.args[1], second.args[1]) == (0, 1) and given == {"chunks": 2, "dim": -1}
        if not isinstance(x, fx.Node) or not both:
            return None
        size = shape_of(x)
        return x if size is not None and size[-1] % 2 == 0 else None
    width, size = int(half[-1]), shape_of(one)
    halves = (first, slice(None, width)), (second, slice(width, None))
    slices = all(is_slice(part, one, last) for part, last in halves)
    return one if slices and size is not None and size[-1] == 2 * width else None


def is_slice(node: object, x: fx.Node, last: slice) -> bool:
    """Return whether `node` is ``x[..., last]``."""
    if not isinstance(node, fx.Node) or not calls(node, "getitem") or node.args[0] is not x:
        return False
    index = node.args[1]
    return tuple(index) == (Ellipsis, last) if isinstance(index, tuple) else False


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
