"""Residual adds, each by itself: sums in which one operand is made of the other."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from .effects import dependencies, operation

_ADDS = {operator.add, operator.iadd, torch.add}

_PASS_THROUGH = frozenset(["dropout", "view", "reshape", "contiguous", "to", "type_as", "float"])


@dataclass(frozen=True)
class Residual:
    """An add of the residual stream and a branch.

    Attributes:
        add: The node that adds them.
        stream: The node that made the stream, seen through what gives the same values.
        branch: The operand of `add` that is not the residual.
    """

    add: fx.Node
    stream: fx.Node
    branch: fx.Node


def module_path(node: fx.Node) -> str:
    """Return the module a node was traced in, as a dotted path (``model.layers.0.mlp.act_fn``)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    raw = next(reversed(stack.values()))[0]
    dotted = re.sub(r"(?:\._modules)?\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", raw)
    # the model is `args[0]` in a decorated forward, which those of transformers 5.24 are
    root = r"^L?\.?(?:self|model|args\.0)?\.?"
    return re.sub(root, "", dotted, count=1).removeprefix("_modules.")


def shape_of(node: fx.Node) -> tuple[str, ...] | None:
    """Return the shape of a node's value as it was traced; None for what is not a tensor.

    As text, because comparing symbolic sizes as numbers records a guard.
    """
    value = node.meta.get("example_value")
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else None


def ancestors_of(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return for each node what it depends on, itself included, as bits in graph order."""
    sets: dict[fx.Node, int] = {}
    for i, (node, sources) in enumerate(dependencies(graph.nodes).items()):
        bits = 1 << i
        for source in sources:
            bits |= sets[source]
        sets[node] = bits
    return sets


def root_of(node: fx.Node) -> fx.Node:
    """Return a node without the operations around it that give the same values (idle dropout)."""
    while node.op in ("call_function", "call_method") and operation(node) in _PASS_THROUGH:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def unscaled(node: fx.Node) -> fx.Node:
    """Return what a term is a multiple of.

    That is the output of a module which was scaled outside of the module.

    """
    node = root_of(node)
    while operation(node) == "mul" and node.op in ("call_function", "call_method"):
        factors = [a for a in node.args if isinstance(a, fx.Node) and a.op != "placeholder"]
        if len(factors) != 1:
            break
        node = root_of(factors[0])
    return node


def is_plain_add(node: fx.Node) -> bool:
    """Return whether a node calls an add as a function, whatever its operands are."""
    return node.op == "call_function" and node.target in _ADDS


def is_add(node: fx.Node) -> bool:
    """Return whether a node is the sum of two others, nothing scaled."""
    adds = is_plain_add(node) or (node.op == "call_method" and node.target in ("add", "add_"))
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    return adds and len(operands) == len(node.args) == 2 and not node.kwargs


def residual_of(
    node: fx.Node, order: Mapping[fx.Node, int], ancestors: Mapping[fx.Node, int]
) -> Residual | None:
    """Return the stream and the branch that a node adds, if one is an ancestor of the other."""
    if not is_add(node):
        return None
    a, b = node.args
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    shape = shape_of(node)
    if shape is None or len(shape) < 2:
        return None
    for residual, branch in ((a, b), (b, a)):
        if shape_of(residual) != shape or not _fits(branch, shape):
            continue
        stream = root_of(residual)
        if stream is not root_of(branch) and ancestors[branch] >> order[stream] & 1:
            return Residual(node, stream, branch)
    return None


def _fits(branch: fx.Node, shape: tuple[str, ...]) -> bool:
    """Return whether a branch is as large as the stream; a length may be written differently."""
    mine = shape_of(branch)
    return (
        mine is not None
        and len(mine) == len(shape)
        and not any(one != other and one.isdigit() for one, other in zip(mine, shape, strict=True))
    )


def branch_path(total: fx.Node, term: fx.Node) -> str:
    """Return the module path of a branch that `total` adds, down to the child of the layer."""
    branch = module_path(unscaled(term))
    layer = module_path(total)
    if branch.startswith(layer + ".") and re.search(r"(?:^|\.)\d+$", layer):
        return layer + "." + branch[len(layer) + 1 :].split(".")[0]
    return branch or layer
