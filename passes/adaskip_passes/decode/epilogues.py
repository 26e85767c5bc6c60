"""What follows a projection and may become part of it: see :func:`projection_ops.project`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import fx

from .activations import activated
from .matching import by_number, calls, example, only_user, operands, shape_of, whole_of


class Gate(NamedTuple):
    """A product of an activated tensor and another one, and which of them is the gate."""

    product: fx.Node
    activation: str
    is_first: bool


class Epilogue(NamedTuple):
    """What a projection's result becomes: activated, multiplied, and added to a residual."""

    result: fx.Node
    activation: str = ""
    factor: float = 1.0
    residual: fx.Node | None = None


def gate_of(first: fx.Node, second: fx.Node, overwritten: set[fx.Node]) -> Gate | None:
    """Return ``function(gate) * up`` of two tensors, in any order, if nothing else reads them."""
    if shape_of(first) != shape_of(second):
        return None
    for gate, up in ((first, second), (second, first)):
        found = activated(gate)
        product = only_user(found[0]) if found is not None else None
        if found is None or product is None or only_user(up) is not product:
            continue
        if not calls(product, "mul") or {up, found[0]} != set(product.args) or product.kwargs:
            continue
        if overwritten.isdisjoint((found[0], product)):
            return Gate(product, found[1], gate is first)
    return None


def gate_of_halves(whole: fx.Node, overwritten: set[fx.Node]) -> Gate | None:
    """Return the same of the two halves of one tensor (GLM, Phi-3)."""
    parts = only_user(whole)
    users = list(parts.users if parts is not None and calls(parts, "chunk") else whole.users)
    if len(users) != 2 or not overwritten.isdisjoint((whole, *users)):
        return None
    for first, second in (users, users[::-1]):
        if whole_of(first, second) is whole:
            return gate_of(first, second, overwritten)
    return None


def epilogue_of(linear: fx.Node, overwritten: set[fx.Node]) -> Epilogue:
    """Return what follows a projection, as far as nothing else reads what is between."""
    found = activated(linear)
    if found is not None and found[0] not in overwritten:
        return Epilogue(*found)
    last, user, factor = linear, only_user(linear), 1.0
    while user is not None and user not in overwritten:
        times = _factor(user, last) if factor == 1.0 else None
        if times is None and not _drops_nothing(user):
            break
        factor *= 1.0 if times is None else times
        last, user = user, only_user(user)
    residual = _residual(user, last) if user is not None else None
    if user is not None and residual is not None and overwritten.isdisjoint((user, residual)):
        return Epilogue(user, "", factor, residual)
    return Epilogue(last, "", factor)


def _residual(add: fx.Node, last: fx.Node) -> fx.Node | None:
    """Return what a node adds to another, of the same shape, as wide or wider."""
    for one, other in operands(add, "add"):
        mine, theirs = example(one), example(other)
        if one is not last or other is last or mine is None or theirs is None:
            continue
        fits = mine.shape == theirs.shape and theirs.dtype in (mine.dtype, torch.float32)
        return other if fits else None
    return None


def _factor(node: fx.Node, last: fx.Node) -> float | None:
    """Return the number that a node multiplies another by, or divides it by if that is exact."""
    tensor, number = by_number(node, "mul")
    if tensor is last:
        return number
    tensor, number = by_number(node, "truediv") if node.args[:1] == (last,) else (None, 0.0)
    exact = math.isfinite(number) and abs(math.frexp(number)[0]) == 0.5  # a power of two
    return 1.0 / number if tensor is last and exact else None


def _drops_nothing(node: fx.Node) -> bool:
    """Return whether a node is dropout that is switched off."""
    names = ("input", "p", "training", "inplace")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return calls(node, "dropout") and given.get("training") is False and not given.get("inplace")
