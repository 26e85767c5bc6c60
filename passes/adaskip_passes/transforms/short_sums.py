"""Inner pass for a prompt: a sum over a few neighbours is written out.

Before::                After::

    y = x.sum(1)            y = (x[:, 0].float() + x[:, 1].float() + ...).to(dtype)

That is what a mixture of experts does with what a token's experts gave. A compiler makes a
reduction of it, whose lanes read across the rows; written out they read along them. Legal because
the same numbers are added, in float32, and rounded once; their order may be another one, so the
pass preserves results to rounding.

A sum is left alone along the last dimension, of more than `MOST` numbers, of integers, or where it
keeps the dimension or takes a dtype.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import torch
from torch import fx

from ..analysis.effects import operation
from ..infra.pass_base import Pass, PassResult

MOST = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WriteOutShortSums(Pass):
    """Pass over the graph of a piece, whose nodes carry their example values.

    Its changes are sums that were written out.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Write the sums out; see :class:`Pass`."""
        graph, changes = graph_module.graph, 0
        for node in list(graph.nodes):
            found = _short(node)
            if found is not None:
                _write_out(graph, node, *found)
                changes += 1
        return PassResult(graph_module, changes)


def _short(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Return what a node sums, along which dimension, and how many; None for other nodes."""
    if node.op not in ("call_function", "call_method") or operation(node) != "sum":
        return None
    given = {**dict(zip(("input", "dim"), node.args, strict=False)), **node.kwargs}
    source, dim = given.pop("input", None), given.pop("dim", None)
    if given or not isinstance(source, fx.Node) or not isinstance(dim, int) or len(node.args) > 2:
        return None
    value = source.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dtype not in _DTYPES:
        return None
    if not -value.dim() <= dim < value.dim():
        return None
    dim %= value.dim()
    count = value.shape[dim]
    if dim == value.dim() - 1 or not isinstance(count, int) or not 0 < count <= MOST:
        return None
    return source, dim, count


def _write_out(graph: fx.Graph, node: fx.Node, source: fx.Node, dim: int, count: int) -> None:
    value = source.meta["example_value"]
    with graph.inserting_before(node):
        wide = [
            graph.call_method("float", (graph.call_function(torch.select, (source, dim, i)),))
            for i in range(count)
        ]
        total = functools.reduce(lambda a, b: graph.call_function(operator.add, (a, b)), wide)
        result = graph.call_method("to", (total, value.dtype))
    result.meta["example_value"] = node.meta.get("example_value")
    node.replace_all_uses_with(result)
    graph.erase_node(node)
