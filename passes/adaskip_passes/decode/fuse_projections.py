"""Inner pass for a decode step: a sublayer's projections as few operators.

Before::                                        After::

    h = w_norm * normalize(x)                   q, k, v = project(x, [wq, wk, wv], norm=w_norm)
    q = linear(h, wq)
    k = linear(h, wk)
    v = linear(h, wv)

and likewise a layer norm, ``silu(gate) * up``, also of the halves of one projection, an activation
after a projection, numbers that its input or its result is multiplied by, and the residual add
after the last one, seen through dropout that drops nothing (:mod:`norms`, :mod:`activations`,
:mod:`factors` and :mod:`epilogues` list what is recognized). The weights stay where they are: the
operator takes several of them, or parts of one, and reads as it is what a router has in float32.
Legal because the same values are computed from the same operands; they are rounded less often (the
norm's result and the gate stay in float32, as does a stream in float32 on its way to a norm and
from a projection), so the pass preserves results to rounding, not to the bit.
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
from itertools import combinations
from typing import NamedTuple

import torch
from torch import fx

from ..infra.pass_base import Pass, PassResult
from ..transforms.dead_code import eliminate_dead_code
from .epilogues import epilogue_of, gate_of, gate_of_halves
from .factors import factor_of, move_factors
from .matching import (
    calls,
    dtype_of,
    example,
    find_overwritten,
    most_rows,
    shape_of,
    unwidened,
)
from .norms import Norm, norm_of
from .ops import MAX_ROWS
from .projection_ops import project as project  # the operator

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
    by_input: dict[tuple[fx.Node, bool, bool], list[fx.Node]] = {}
    fitting = [n for n in graph.nodes if calls(n, "linear") and _fits(n, overwritten)]
    for node in fitting:
        if _bias(node) is None:
            move_factors(node, overwritten)
    for node in fitting:
        if _fits(node, overwritten):
            key = _source(node), _bias(node) is not None, _read(node)[2]
            by_input.setdefault(key, []).append(node)
    return [group for nodes in by_input.values() for group in _cut(nodes, overwritten)]


def _cut(nodes: list[fx.Node], overwritten: set[fx.Node]) -> list[list[fx.Node]]:
    """Return projections of one input in groups: a gate and what it gates are one of their own."""
    groups, left = list[list[fx.Node]](), list(nodes)
    for first, second in combinations(nodes, 2):
        one, other = _result(first, overwritten)[0], _result(second, overwritten)[0]
        if {first, second} <= {*left} and gate_of(one, other, overwritten) is not None:
            groups.append([first, second])
            left = [n for n in left if n not in (first, second)]
    return groups + [left[i : i + _TOGETHER] for i in range(0, len(left), _TOGETHER)]


def _fits(node: fx.Node, overwritten: set[fx.Node]) -> bool:
    if len(node.args) < 2:
        return False
    source, of, wide = _read(node)
    parameters = [a for a in (of, _bias(node)) if isinstance(a, fx.Node)]
    x, weight, bias = example(source), example(of), example(_bias(node))
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
        and (_bias(node) is None or (bias is not None and bias.dtype == x.dtype and not wide))
        and weight.dim() == 2
        and weight.is_contiguous()
        and overwritten.isdisjoint((_source(node), *parameters))
    )


class _Parts(NamedTuple):
    """What a group of projections is computed of, and what its results are."""

    weights: list[fx.Node]
    biases: list[fx.Node]
    factors: list[float]
    results: list[fx.Node]
    activation: str = ""
    residual: fx.Node | None = None


def _fuse(
    graph: fx.Graph,
    group: list[fx.Node],
    overwritten: set[fx.Node],
    norms: dict[fx.Node, fx.Node],
) -> None:
    """Make a group one call; `norms` are those that are calls of their own already, by result."""
    parts = _parts(graph, group, overwritten)
    factors = parts.factors if set(parts.factors) != {1.0} else None
    norm = _norm(graph, _source(group[0]), overwritten, norms)
    before = norm.x, parts.weights, parts.biases, norm.weight, norm.eps
    after = norm.offset, norm.shift, norm.centered, factors, _read(group[0])[2]
    with graph.inserting_before(group[0] if parts.residual is None else parts.results[0]):
        call = graph.call_function(
            torch.ops.adaskip.project.default, (*before, parts.activation, parts.residual, *after)
        )
        items = [
            graph.call_function(operator.getitem, (call, i)) for i in range(len(parts.results))
        ]
    for item, result in zip(items, parts.results, strict=True):
        item.meta["example_value"] = result.meta.get("example_value")
        result.replace_all_uses_with(item)


def _parts(graph: fx.Graph, group: list[fx.Node], overwritten: set[fx.Node]) -> _Parts:
    found = {n: _result(n, overwritten) for n in group}
    first, *others = group
    gate = None
    if len(others) == 1:
        gate = gate_of(found[first][0], found[others[0]][0], overwritten)
    if gate is not None and not gate.is_first:
        group = group[::-1]
    weights = [w for n in group if isinstance(w := _read(n)[1], fx.Node)]
    biases = [b for n in group if isinstance(b := _bias(n), fx.Node)]
    parts = _Parts(weights, biases, [found[n][1] for n in group], [found[n][0] for n in group])
    if gate is not None:
        return parts._replace(results=[gate.product], activation=gate.activation)
    if others:
        return parts
    gate = gate_of_halves(first, overwritten) if _has_aligned_halves(weights[0]) else None
    if gate is None:
        after = epilogue_of(parts.results[0], overwritten)
        return parts._replace(
            results=[after.result], activation=after.activation, residual=after.residual
        )
    order = 1 if gate.is_first else -1
    halves = [_halves(graph, first, p)[::order] for p in (*weights, *biases)]
    return _Parts(
        halves[0],
        [b for both in halves[1:] for b in both],
        [1.0, 1.0],
        [gate.product],
        gate.activation,
    )


def _result(linear: fx.Node, overwritten: set[fx.Node]) -> tuple[fx.Node, float]:
    """Return the multiple of a projection that alone is read, and which: a bias is none."""
    return factor_of(linear, overwritten) if _bias(linear) is None else (linear, 1.0)


def _has_aligned_halves(weight: fx.Node) -> bool:
    """Return whether a kernel may read 16 bytes at once of both halves of a weight's outputs."""
    value = example(weight)
    return value is not None and value.numel() * value.element_size() % 32 == 0


def _halves(graph: fx.Graph, before: fx.Node, parameter: fx.Node) -> list[fx.Node]:
    """Return the halves of a weight or bias, by output."""
    value = example(parameter)
    assert value is not None
    middle, halves = value.shape[0] // 2, []
    for part in (slice(None, middle), slice(middle, None)):
        with graph.inserting_before(before):
            half = graph.call_function(operator.getitem, (parameter, part))
        half.meta["example_value"] = value[part]
        halves.append(half)
    return halves


def _norm(
    graph: fx.Graph, source: fx.Node, overwritten: set[fx.Node], norms: dict[fx.Node, fx.Node]
) -> Norm:
    """Return the norm that is computed with a projection of `source`, or none, of what it reads."""
    norm, shape = norm_of(source), shape_of(source)
    if norm is None or not overwritten.isdisjoint(_between(source, norm.inputs)):
        return Norm(source)
    if shape is not None and most_rows(shape) == 1:
        return norm
    if source not in norms:
        with graph.inserting_after(source):
            norms[source] = graph.call_function(torch.ops.adaskip.normalize.default, tuple(norm))
        norms[source].meta["example_value"] = source.meta["example_value"]
    return Norm(norms[source])


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


def _read(linear: fx.Node) -> tuple[object, object, bool]:
    """Return what a projection reads, its weight, and whether both were widened for it before.

    As a router does whose logits are in float32: then they are read as they are.
    """
    x, weight = linear.args[:2]
    if isinstance(x, fx.Node) and isinstance(weight, fx.Node) and dtype_of(x) == torch.float32:
        narrow = unwidened(x), unwidened(weight)
        if dtype_of(narrow[0]) == dtype_of(narrow[1]) != torch.float32:
            return *narrow, True
    return x, weight, False


def _source(linear: fx.Node) -> fx.Node:
    """Return what a projection reads, seen through slices and views that change nothing."""
    node = _read(linear)[0]
    assert isinstance(node, fx.Node)
    while calls(node, "getitem", "view", "reshape"):
        base = node.args[0]
        if (
            not isinstance(base, fx.Node)
            or shape_of(base) is None
            or shape_of(base) != shape_of(node)
            or dtype_of(base) != dtype_of(node)
        ):
            break
        slices = _items(node.args[1]) if calls(node, "getitem") else ()
        if not all(isinstance(i, slice) for i in slices):
            break
        node = base
    return node


def _items(index: object) -> Iterable[object]:
    return index if isinstance(index, tuple | list) else (index,)
