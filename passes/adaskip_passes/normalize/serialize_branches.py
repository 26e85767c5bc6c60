"""Write parallel branches of a captured decoder one after the other.

GPT-NeoX, GPT-J, Phi, Falcon and Cohere add attention and FFN, which read the same stream, in one
expression. Before and after::

    n = norm(x)                           n   = norm(x)
    a = attention(n)                      a   = attention(n)
    f = ffn(n)                            x_1 = x + a
    y = x + (a + f)                       n_1 = norm(ordered_after(x_1, x))
                                          f   = ffn(n_1)
                                          y   = x_1 + f

Each branch is then a sublayer of its own, and either can be skipped; what both read (the norm, with
casts of its weights) is computed by both. ``ordered_after(x_1, x)`` is `x`: it says that what reads
it belongs behind `x_1`, and is left out of the pieces.

Legal because sums may be regrouped, but for rounding (which is never coarser than it was), and
because a branch that is moved reads nothing that is written behind it, and what it writes (a state,
next to attention's keys and values) nobody else sees meanwhile. Where that is not so, or a branch
has an autocast region of its own, the expression is left as it is (and refused by
:func:`find_sublayers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import TypeVar

import torch
from torch import fx

from ..analysis.effects import is_mutation
from ..infra.pass_base import Pass, PassResult
from .parallel_sums import ParallelSum, find_sums

Value = TypeVar("Value")


def ordered_after(later: object, value: Value) -> Value:
    """Return `value`, for what comes after `later`.

    Args:
        later: What has to be computed before; its value is not used.
        value: What is returned.

    """
    return value


@dataclass(frozen=True)
class SerializeBranches(Pass):
    """Pass over a captured graph: write every sum of several branches as a chain of adds.

    Its changes are sums.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the sums; see :class:`Pass`."""
        graph = graph_module.graph
        found = find_sums(graph)
        written: dict[fx.Node, fx.Node] = {}  # for each sum the last add of its chain
        for parallel in found:
            written[parallel.total] = _write(graph, parallel, written)
        return PassResult(graph_module, len(found))


def _write(graph: fx.Graph, parallel: ParallelSum, written: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Write a sum as a chain; returns its last add."""
    stream, x = (
        written.get(parallel.stream, parallel.stream),
        written.get(parallel.residual, parallel.residual),
    )
    with graph.inserting_before(parallel.total):
        for number, (terms, region) in enumerate(
            zip(parallel.branches, parallel.regions, strict=True)
        ):
            copies = _moved(graph, region, stream, x, parallel.total) if number else {}
            branch = copies.get(terms[0], terms[0])
            for term in terms[1:]:
                branch = _add(graph, branch, copies.get(term, term), parallel.total, terms[0])
            x = _add(graph, x, branch, parallel.total, parallel.total)
    parallel.total.replace_all_uses_with(x)
    for node in (
        parallel.total,
        *parallel.inner,
        *(n for r in parallel.regions[1:] for n in reversed(r)),
    ):
        if not node.users:
            graph.erase_node(node)
    return x


def _moved(
    graph: fx.Graph, region: Sequence[fx.Node], stream: fx.Node, x: fx.Node, like: fx.Node
) -> dict[fx.Node, fx.Node]:
    """Copy what lies between the stream and a branch, so that it comes after `x`."""
    before = graph.call_function(ordered_after, (x, stream))
    before.meta = _meta(like, stream)
    copies = {stream: before}
    for node in region:
        for source in node.all_input_nodes:
            if source not in copies and _is_cast_of_input(source):
                copies[source] = graph.node_copy(source)
        copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    return copies


def _is_cast_of_input(node: fx.Node) -> bool:
    """Return whether a node is an input of the graph in another dtype, which nothing overwrites."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.op != "placeholder":
        return False
    if node.op != "call_method" or node.target not in ("to", "float"):
        return False
    return not any(is_mutation(user) for one in (node, source) for user in one.users)


def _add(graph: fx.Graph, left: fx.Node, right: fx.Node, like: fx.Node, value: fx.Node) -> fx.Node:
    """Return an add where `like` is, of the shape and dtype of `value`."""
    node = graph.call_function(add, (left, right))
    node.meta = _meta(like, value)
    return node


def _meta(origin: fx.Node, value: fx.Node) -> dict[str, object]:
    """Return the description of a new node: where it belongs, and what its value is like."""
    assert isinstance(value.meta["example_value"], torch.Tensor)
    meta: dict[str, object] = {"example_value": value.meta["example_value"]}
    if "nn_module_stack" in origin.meta:
        meta["nn_module_stack"] = origin.meta["nn_module_stack"]
    return meta
