"""What follows a projection and may become part of it: see :func:`projection_ops.project`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from .activations import activated
from .matching import calls, example, only_user, operands, shape_of, whole_of


class Gate(NamedTuple):
    """A product of an activated tensor and another one, and which of them is the gate."""

    product: fx.Node
    activation: str
    is_first: bool


class Epilogue(NamedTuple):
    """What a projection's result becomes: activated, or added to a residual."""

    result: fx.Node
    activation: str = ""
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


def epilogue_of(result: fx.Node, overwritten: set[fx.Node]) -> Epilogue:
    """Return what follows a projection, as far as nothing else reads what is between."""
    found = activated(result)
    if found is not None and found[0] not in overwritten:
        return Epilogue(*found)
    last, user = result, only_user(result)
    while user is not None and user not in overwritten and _drops_nothing(user):
        last, user = user, only_user(user)
    residual = _residual(user, last) if user is not None else None
    if user is not None and residual is not None and overwritten.isdisjoint((user, residual)):
        return Epilogue(user, "", residual)
    return Epilogue(last)


def _residual(add: fx.Node, last: fx.Node) -> fx.Node | None:
    """Return what a node adds to another, of the same shape, as wide or wider."""
    for one, other in operands(add, "add"):
        mine, theirs = example(one), example(other)
        if one is not last or other is last or mine is None or theirs is None:
            continue
        fits = mine.shape == theirs.shape and theirs.dtype in (mine.dtype, torch.float32)
        return other if fits else None
    return None


def _drops_nothing(node: fx.Node) -> bool:
    """Return whether a node is dropout that is switched off."""
    names = ("input", "p", "training", "inplace")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return calls(node, "dropout") and given.get("training") is False and not given.get("inplace")
