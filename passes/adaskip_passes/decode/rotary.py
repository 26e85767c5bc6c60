"""Rotary embeddings as transformers writes them, by the nodes that they end with.

``x * cos + pairs * sin``, where `pairs` are ``cat((-x[..., D / 2 :], x[..., : D / 2]))`` (the order
of GPT-NeoX) or ``stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)`` (that of GPT-J: neighbours
are pairs); or halves that are written out, ``cat((a * cos - b * sin, b * cos + a * sin))``, with an
angle for each pair (GPT-OSS), also of neighbours a and b (DeepSeek-V3); or a product of complex
numbers (DeepSeek-V2). It may be computed in float32, and of the first numbers of a head alone,
beside which the others are put again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from .matching import (
    argument,
    calls,
    dtype_of,
    example,
    is_slice,
    operands,
    shape_of,
    two_parts,
    uncast,
    unwidened,
    whole_of,
)


class Rotation(NamedTuple):
    """What was rotated, [B, H, T, D], and how: see :func:`rotation.rotate`.

    Where angles are complex numbers, these are both cosines and sines.
    """

    x: fx.Node
    cosines: fx.Node
    sines: fx.Node
    rotary_dim: int
    interleaved: bool = False
    unzipped: bool = False


def rotation(node: fx.Node) -> Rotation | None:
    """Return the rotation that made `node`, which has its dtype; None if none did."""
    found = _rotation(uncast(node))
    if found is None or dtype_of(found.x) != dtype_of(node):
        return None
    cosines, sines = (example(n) for n in (found.cosines, found.sines))
    return found if cosines is not None and sines is not None else None


def _rotation(node: fx.Node) -> Rotation | None:
    if (found := _by_halves(node) or _by_complex_numbers(node)) is not None:
        return found
    if (parts := two_parts(node)) is not None:
        return _of_a_part(*parts)
    for plain, crossed in operands(node, "add"):
        for wide, cosines in operands(plain, "mul"):
            x = unwidened(wide)
            for pairs, sines in operands(crossed, "mul"):
                interleaved = _order_of_pairs(unwidened(pairs), x)
                if interleaved is None:
                    continue
                if not all(_is_angle(n, x) for n in (cosines, sines)):
                    continue
                if interleaved:
                    cosines, sines = _of_pairs(cosines), _of_pairs(sines)
                return Rotation(x, cosines, sines, _width(x), interleaved)
    return None


def _of_a_part(turned: fx.Node, others: fx.Node) -> Rotation | None:
    """Return a rotation of a head's first numbers, beside which the others are put."""
    found, rest = rotation(turned), shape_of(others)
    if found is None or rest is None or rest[-1] == 0:
        return found  # all of a head, of which a part might have been (Phi-3)
    x, dim = argument(found.x, "getitem"), _width(found.x)
    if x is None or x is not argument(others, "getitem") or _width(x) != dim + rest[-1]:
        return None
    both = is_slice(found.x, x, slice(None, dim)) and is_slice(others, x, slice(dim, None))
    return found._replace(x=x) if both else None


def _by_halves(node: fx.Node) -> Rotation | None:
    """Return one that is ``cat((a * cos - b * sin, b * cos + a * sin), -1)``, of halves a and b."""
    parts = two_parts(node)
    if parts is None or not calls(parts[0], "sub") or len(parts[0].args) != 2:
        return None
    plain, crossed = parts[0].args
    if parts[0].kwargs or not isinstance(plain, fx.Node) or not isinstance(crossed, fx.Node):
        return None
    for a, cosines in operands(plain, "mul"):
        for b, sines in operands(crossed, "mul"):
            whole, neighbours = whole_of(a, b), _of_neighbours(a, b)
            x = whole if whole is not None else neighbours
            if x is None or not all(_is_angle(n, x, 2) for n in (cosines, sines)):
                continue
            for one, other in operands(parts[1], "add"):
                turned = (b, cosines) in operands(one, "mul")
                if turned and (a, sines) in operands(other, "mul"):
                    unzipped = whole is None
                    return Rotation(x, cosines, sines, _width(x), unzipped, unzipped)
    return None


def _of_neighbours(first: fx.Node, second: fx.Node) -> fx.Node | None:
    """Return what two nodes are the even and the odd numbers of; None if they are not."""
    x = argument(first, "getitem")
    if x is None or shape_of(x) is None or _width(x) % 2:
        return None
    even = any(is_slice(first, x, slice(begin, None, 2)) for begin in (None, 0))
    return x if even and is_slice(second, x, slice(1, None, 2)) else None


def _by_complex_numbers(node: fx.Node) -> Rotation | None:
    """Return one that is a product of angles and of neighbours seen as complex numbers."""
    whole = argument(node, "flatten")
    product = argument(whole, "view_as_real") if whole is not None else None
    if product is None or node.args[1:] not in ((3,), (-2,)) or node.kwargs:
        return None
    for numbers, angles in operands(product, "mul"):
        pairs = argument(numbers, "view_as_complex")
        wide = argument(pairs, "reshape", "view") if pairs is not None else None
        if pairs is None or wide is None:
            continue
        x, shape, of = unwidened(wide), shape_of(wide), example(angles)
        if shape is None or len(shape) != 4 or of is None or not of.is_complex():
            continue
        (rows, _, tokens, dim), size = shape, tuple(of.shape)
        if shape_of(pairs) == (*shape[:3], dim // 2, 2) and size in (
            (rows, 1, tokens, dim // 2),
            (1, 1, tokens, dim // 2),
        ):
            return Rotation(x, angles, angles, dim, True)
    return None


def _order_of_pairs(node: fx.Node, x: fx.Node) -> bool | None:
    """Return whether `node` is of neighbours in x, each with the other's number, or of halves.

    The second of a pair is negated and comes first. None if `node` is something else.
    """
    if shape_of(x) is None or _width(x) % 2:
        return None
    if (parts := two_parts(node)) is not None:
        half = _width(x) // 2
        slices = slice(half, None), slice(None, half)
        return False if _are_turned(parts, x, slices) else None
    if (stacked := argument(node, "flatten")) is None or node.args[1:] != (-2,) or node.kwargs:
        return None
    parts = two_parts(stacked, "stack")
    neighbours = [(slice(1, None, 2), slice(first, None, 2)) for first in (None, 0)]
    found = parts is not None and any(_are_turned(parts, x, slices) for slices in neighbours)
    return True if found else None


def _are_turned(parts: tuple[fx.Node, fx.Node], x: fx.Node, slices: tuple[slice, slice]) -> bool:
    """Return whether two parts are ``-x[..., slices[0]]`` and ``x[..., slices[1]]``."""
    return _is_slice(argument(parts[0], "neg"), x, slices[0]) and _is_slice(parts[1], x, slices[1])


def _is_slice(node: fx.Node | None, x: fx.Node, last: slice) -> bool:
    """Return whether `node` is ``x[..., last]``, perhaps of x in a wider dtype."""
    base = argument(node, "getitem") if node is not None else None
    if base is None or x not in (base, unwidened(base)):
        return False
    return is_slice(node, base, last)


def _is_angle(node: fx.Node, x: fx.Node, share: int = 1) -> bool:
    """Return whether `node` is of an angle for each token and dimension of x, [B or 1, 1, T, D].

    Or for one of `share` dimensions.
    """
    value, source = example(node), example(x)
    if value is None or source is None or value.dim() != 4:
        return False
    if value.dtype not in (source.dtype, torch.promote_types(source.dtype, torch.float32)):
        return False
    (rows, heads, *rest), shape = value.shape, source.shape
    return rows in (1, shape[0]) and heads == 1 and tuple(rest) == (shape[2], shape[3] // share)


def _of_pairs(angles: fx.Node) -> fx.Node:
    """Return an angle for each pair if `angles` repeat it for both numbers, and else `angles`."""
    pairs = argument(angles, "repeat_interleave")
    if pairs is None or example(pairs) is None:
        return angles
    given = {**dict(zip(("input", "repeats", "dim"), angles.args, strict=False)), **angles.kwargs}
    twice = given == {"input": pairs, "repeats": 2, "dim": given.get("dim")}
    return pairs if twice and given["dim"] in (-1, 3) else angles


def _width(node: fx.Node) -> int:
    """Return how many numbers there are in the last dimension."""
    shape = shape_of(node)
    assert shape is not None
    return int(shape[-1])
