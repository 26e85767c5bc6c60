"""Inner pass for a decode step: attention rotates its queries and new keys itself.

Before::

    q2 = q * cos + cat((-q[..., D / 2 :], q[..., : D / 2])) * sin
    k2 = k * cos + cat((-k[..., D / 2 :], k[..., : D / 2])) * sin
    y = store_and_attend(q2, keys, values, k2, v, None, None, bounds)

After::

    y = store_and_attend(q, keys, values, k, v, cos, sin, bounds)

A kernel less a layer, and one that no other may overlap with. Rotary embeddings of all of a head,
halves as pairs (Su et al., "RoFormer", eq. 34, in the order of GPT-NeoX), are recognized, also
where each half is written out, ``cat((a * cos - b * sin, b * cos + a * sin))``, with an angle for
each pair (GPT-OSS); others stay. Legal because the same values are computed from the same operands;
they are rounded once instead of three times, so the pass preserves results to rounding, not to the
bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..infra.pass_base import Pass, PassResult
from ..transforms.dead_code import eliminate_dead_code
from .matching import (
    argument,
    calls,
    dtype_of,
    example,
    find_overwritten,
    operands,
    shape_of,
    two_parts,
)

_ATTEND = torch.ops.adaskip.store_and_attend.default


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Pass over the graph of a piece. Its changes are attentions that rotate, and erased nodes."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Fuse rotary embeddings into the attention that reads them; see :class:`Pass`."""
        graph = graph_module.graph
        overwritten = find_overwritten(graph)
        fused = [n for n in graph.find_nodes(op="call_function", target=_ATTEND) if not n.kwargs]
        fused = [node for node in fused if _fuse(node, overwritten)]
        erased = eliminate_dead_code(graph) if fused else 0
        return PassResult(graph_module, len(fused) + erased)


def _fuse(attend: fx.Node, overwritten: set[fx.Node]) -> bool:
    """Let `attend` rotate; returns False where it may not."""
    query, keys, values, new_keys, new_values, *given_angles = attend.args[:7]
    rest = attend.args[7:]
    if given_angles != [None, None]:
        return False
    turned = [_rotated(node) for node in (query, new_keys) if isinstance(node, fx.Node)]
    if len(turned) != 2 or turned[0] is None or turned[1] is None:
        return False
    (query, *angles), (new_keys, *others) = turned[0], turned[1]
    cosines, sines = angles
    if angles != others or shape_of(cosines) != shape_of(sines):
        return False
    if not overwritten.isdisjoint((query, new_keys, cosines, sines)):
        return False
    attend.args = (query, keys, values, new_keys, new_values, *angles, *rest)
    return True


def _rotated(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Return what was rotated, the cosines and the sines; None if `node` is something else."""
    parts = two_parts(node)
    if parts is not None and (rest := shape_of(parts[1])) is not None and rest[-1] == 0:
        return _rotated(parts[0])  # all of a head, of which a part might have been (Phi-3)
    for plain, crossed in operands(node, "add"):
        for x, cosines in operands(plain, "mul"):
            for pairs, sines in operands(crossed, "mul"):
                if _is_pairs_of(pairs, x) and all(_is_angle(a, x) for a in (cosines, sines)):
                    return x, cosines, sines
    return _rotated_by_halves(node)


def _rotated_by_halves(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Return the same of ``cat((a * cos - b * sin, b * cos + a * sin), -1)``, of halves a and b."""
    parts = two_parts(node)
    if parts is None or not calls(parts[0], "sub") or len(parts[0].args) != 2:
        return None
    plain, crossed = parts[0].args
    if parts[0].kwargs or not isinstance(plain, fx.Node) or not isinstance(crossed, fx.Node):
        return None
    for a, cosines in operands(plain, "mul"):
        for b, sines in operands(crossed, "mul"):
            x = _whole_of(a, b)
            if x is None or not all(_is_angle(n, x, 2) for n in (cosines, sines)):
                continue
            for one, other in operands(parts[1], "add"):
                turned = (b, cosines) in operands(one, "mul")
                if turned and (a, sines) in operands(other, "mul"):
                    return x, cosines, sines
    return None


def _whole_of(first: fx.Node, second: fx.Node) -> fx.Node | None:
    """Return what two nodes are the halves of; None if they are not."""
    one, other = argument(first, "getitem"), argument(second, "getitem")
    shape = shape_of(first)
    if one is None or one is not other or shape is None:
        return None
    if calls(one, "chunk"):
        given = {**dict(zip(("input", "chunks", "dim"), one.args, strict=False)), **one.kwargs}
        x = given.pop("input")
        both = (first.args[1], second.args[1]) == (0, 1) and given == {"chunks": 2, "dim": -1}
        if not isinstance(x, fx.Node) or not both:
            return None
        size = shape_of(x)
        return x if size is not None and size[-1] % 2 == 0 else None
    half = int(shape[-1])
    slices = _is_slice(first, one, slice(None, half)) and _is_slice(second, one, slice(half, None))
    size = shape_of(one)
    return one if slices and size is not None and size[-1] == 2 * half else None


def _is_pairs_of(node: fx.Node, x: fx.Node) -> bool:
    """Return whether `node` is ``cat((-second half of x, first half of x), -1)``."""
    shape, parts = shape_of(x), two_parts(node)
    if parts is None or shape is None or shape[-1] % 2:
        return False
    second = argument(parts[0], "neg")
    half = int(shape[-1]) // 2
    return _is_slice(second, x, slice(half, None)) and _is_slice(parts[1], x, slice(None, half))


def _is_slice(node: object, x: fx.Node, last: slice) -> bool:
    """Return whether `node` is ``x[..., last]``."""
    if not isinstance(node, fx.Node) or not calls(node, "getitem") or node.args[0] is not x:
        return False
    return tuple(node.args[1]) == (Ellipsis, last) if isinstance(node.args[1], tuple) else False


def _is_angle(node: fx.Node, x: fx.Node, share: int = 1) -> bool:
    """Return whether `node` is of an angle for each token and dimension of x, [B or 1, 1, T, D].

    Or for one of `share` dimensions.
    """
    value, shape = example(node), shape_of(x)
    if value is None or shape is None or value.dim() != 4 or value.dtype != dtype_of(x):
        return False
    rows, heads, *rest = value.shape
    return rows in (1, shape[0]) and heads == 1 and tuple(rest) == (shape[2], shape[3] // share)
