"""Inner pass for a decode step: a sublayer's projections as few operators.

Before::                                        After::

    h = w_norm * normalize(x)                   q, k, v = project(x, [wq, wk, wv], norm=w_norm)
    q = linear(h, wq)
    k = linear(h, wk)
    v = linear(h, wv)

and likewise ``silu(gate) * up``, ``gelu(gate) * up`` by its tanh, and the residual add after the
last projection, seen through dropout that drops nothing. The weights stay where they are: the
operator takes several of them. Legal because the same values are computed from the same operands;
they are rounded less often (the norm's result and the gate stay in float32, as does a stream in
float32 on its way to a norm and from a projection), so the pass preserves results to rounding, not
to the bit.
For more than one row the norm is an operator of its own, `normalize`: on the matrix units every
program of the projections would repeat it.

A projection is left alone where its weight is not an input of the piece, or is stored in a class of
tensors of its own (quantized), its input has more than `MAX_ROWS` rows or another dtype, or
something writes to its input in place. A norm, gate or add
that anything else reads, or that has another form, stays as it is, beside the fused projections.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ..infra.pass_base import Pass, PassResult
from ..transforms.dead_code import eliminate_dead_code
from .matching import (
    calls,
    example,
    find_overwritten,
    most_rows,
    only_user,
    shape_of,
)
from .ops import MAX_ROWS
from .rms_norm import rms_norm

_TOGETHER = 3  # weights that one operator takes


@dataclass(frozen=True)
class FuseProjections(Pass):
    """Pass over the graph of a piece, whose nodes carry their example values.

    Its changes are fused groups of projections and erased nodes.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Fuse the projections; see :class:`Pass`."""
        graph = graph_module.graph
        overwritten = find_overwritten(graph)
        groups = _groups(graph, overwritten)
        norms: dict[fx.Node, fx.Node] = {}
        for group in groups:
            _fuse(graph, group, overwritten, norms)
        erased = eliminate_dead_code(graph)
        return PassResult(graph_module, len(groups) + erased)


def _groups(graph: fx.Graph, overwritten: set[fx.Node]) -> list[list[fx.Node]]:
    """Return the projections of one input, in program order, at most `_TOGETHER` in a group."""
    by_input: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
    for node in graph.nodes:
        if calls(node, "linear") and _fits(node, overwritten):
            by_input.setdefault((_source(node), _bias(node) is not None), []).append(node)
    return [
        nodes[i : i + _TOGETHER]
        for nodes in by_input.values()
        for i in range(0, len(nodes), _TOGETHER)
    ]


def _fits(node: fx.Node, overwritten: set[fx.Node]) -> bool:
    if len(node.args) < 2:
        return False
    parameters = [a for a in (node.args[1], _bias(node)) if isinstance(a, fx.Node)]
    source, x, weight = node.args[0], example(node.args[0]), example(node.args[1])
    bias = example(_bias(node))
    if not isinstance(source, fx.Node) or x is None or weight is None:
        return False
    if any(isinstance(size, torch.SymInt) for size in (x.shape[-1], *weight.shape)):
        return False
    if any(hasattr(example(p), "__tensor_flatten__") for p in parameters):  # not a plain tensor
        return False
    rows = most_rows(x.shape)
    half = x.dtype in (torch.bfloat16, torch.float16)
    return (
        all(p.op == "placeholder" for p in parameters)
        and (rows == 1 or (half and rows is not None and rows <= MAX_ROWS))
        and x.dtype == weight.dtype
        and (half or x.dtype == torch.float32)
        and (_bias(node) is None or (bias is not None and bias.dtype == x.dtype))
        and weight.dim() == 2
        and weight.is_contiguous()
        and overwritten.isdisjoint((_source(node), *parameters))
    )


def _fuse(
    graph: fx.Graph,
    group: list[fx.Node],
    overwritten: set[fx.Node],
    norms: dict[fx.Node, fx.Node],
) -> None:
    """Make a group one call; `norms` are those that are calls of their own already, by result."""
    source, activation, residual = _source(group[0]), "", None
    results = group
    at = group[0]
    if (gated := _gated(group, overwritten)) is not None:
        *group, product, activation = gated
        results = [product]
    elif len(group) == 1 and (added := _residual(group[0], overwritten)) is not None:
        at, residual = added
        results = [at]
    shape = shape_of(source)
    norm = rms_norm(source)
    if norm is not None and not overwritten.isdisjoint(_between(source, norm[:2])):
        norm = None
    x, weight, eps, offset = norm if norm is not None else (source, None, 0.0, 0.0)
    if norm is not None and (shape is None or most_rows(shape) != 1):
        if source not in norms:
            with graph.inserting_after(source):
                norms[source] = graph.call_function(torch.ops.adaskip.normalize.default, norm)
            norms[source].meta["example_value"] = source.meta["example_value"]
        x, weight, eps, offset = norms[source], None, 0.0, 0.0
    biases = [b for n in group if isinstance(b := _bias(n), fx.Node)]
    with graph.inserting_before(at):
        call = graph.call_function(
            torch.ops.adaskip.project.default,
            (x, [n.args[1] for n in group], biases, weight, eps, activation, residual, offset),
        )
        items = [graph.call_function(operator.getitem, (call, i)) for i in range(len(results))]
    for item, result in zip(items, results, strict=True):
        item.meta["example_value"] = result.meta.get("example_value")
        result.replace_all_uses_with(item)


def _between(result: fx.Node, ends: Iterable[fx.Node]) -> set[fx.Node]:
    """Return what `result` is computed from, down to `ends`, all of them included."""
    found, left = set(ends), [result]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left.extend(node.all_input_nodes)
    return found


def _bias(node: fx.Node) -> object:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _source(linear: fx.Node) -> fx.Node:
    """Return what a projection reads, seen through slices that take everything."""
    node = linear.args[0]
    assert isinstance(node, fx.Node)
    while calls(node, "getitem"):
        base = node.args[0]
        if (
            not isinstance(base, fx.Node)
            or shape_of(base) is None
            or shape_of(base) != shape_of(node)
        ):
            break
        if not all(isinstance(i, slice) for i in _items(node.args[1])):
            break
        node = base
    return node


def _items(index: object) -> Iterable[object]:
    return index if isinstance(index, tuple | list) else (index,)


def _gated(
    group: list[fx.Node], overwritten: set[fx.Node]
) -> tuple[fx.Node, fx.Node, fx.Node, str] | None:
    """Return gate, up, ``function(gate) * up`` and the function, if nothing else reads them."""
    if len(group) != 2 or shape_of(group[0]) != shape_of(group[1]):
        return None
    for gate, up in (group, group[::-1]):
        activated = only_user(gate)
        function = _activation(activated) if activated is not None else None
        if activated is None or function is None:
            continue
        product = only_user(activated)
        if product is None or not calls(product, "mul") or only_user(up) is not product:
            continue
        if overwritten.isdisjoint((activated, product)):
            return gate, up, product, function
    return None


def _activation(node: fx.Node) -> str | None:
    """Return which of the functions that `project` knows a node calls."""
    if calls(node, "silu"):
        return "silu"
    by_tanh = calls(node, "gelu") and node.kwargs == {"approximate": "tanh"}
    return "gelu_tanh" if by_tanh and len(node.args) == 1 else None


def _residual(linear: fx.Node, overwritten: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """Return the add after a projection, and what it adds of the same shape, as wide or wider."""
    last, add = linear, only_user(linear)
    while add is not None and _drops_nothing(add):
        last, add = add, only_user(add)
    if add is None or not calls(add, "add") or len(add.args) != 2 or add.kwargs:
        return None
    other = add.args[1] if add.args[0] is last else add.args[0]
    if not isinstance(other, fx.Node) or other is last:
        return None
    mine, theirs = example(linear), example(other)
    if mine is None or theirs is None:
        return None
    if mine.shape != theirs.shape or theirs.dtype not in (mine.dtype, torch.float32):
        return None
    return (add, other) if overwritten.isdisjoint((add, other)) else None


def _drops_nothing(node: fx.Node) -> bool:
    """Return whether a node is dropout that is switched off."""
    names = ("input", "p", "training", "inplace")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return calls(node, "dropout") and given.get("training") is False and not given.get("inplace")
