"""Write a residual add over flattened tokens as one over the stream.

OPT adds an FFN's branch to the stream as [batch * tokens, hidden]. Before and after::

    flat = x.reshape(-1, hidden)              flat = x.reshape(-1, hidden)
    f    = ffn(flat)                          f    = ffn(flat)
    y    = (flat + f).view(batch, tokens, h)  y    = x + f.view(batch, tokens, h)

Then the stream has one shape, and a sublayer can be left out.

Legal because both adds have the same elements in the same order: `flat` is the stream, reshaped and
nothing else, and the sum is read in the stream's shape alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

from torch import fx

from ..analysis.effects import is_mutation, operation
from ..analysis.residual_adds import is_add, shape_of
from ..infra.pass_base import Pass, PassResult

_RESHAPES = frozenset(["view", "reshape"])


@dataclass(frozen=True)
class Unflatten(Pass):
    """Pass over a captured graph: write adds over flattened tokens in the stream's own shape.

    Its changes are adds.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the adds; see :class:`Pass`."""
        graph = graph_module.graph
        found = [node for node in graph.nodes if _is_flat(node)]
        _unflatten(graph, found)
        return PassResult(graph_module, len(found))


def _unflatten(graph: fx.Graph, totals: Sequence[fx.Node]) -> None:
    for total in totals:
        left, right = (a for a in total.args if isinstance(a, fx.Node))
        flat, branch = (left, right) if _source(left) is not None else (right, left)
        stream = flat.args[0]
        assert isinstance(stream, fx.Node)
        views = list(total.users)
        first = views[0]
        with graph.inserting_before(first):
            wide = graph.node_copy(first, lambda n, t=total, b=branch: b if n is t else n)  # type: ignore[misc]
            wide.meta = dict(first.meta)
            x = graph.call_function(add, (stream, wide))
            x.meta = {**total.meta, "example_value": first.meta["example_value"]}
        for view in views:
            view.replace_all_uses_with(x)
            graph.erase_node(view)
        graph.erase_node(total)


def _is_flat(node: fx.Node) -> bool:
    """Return whether an add of a reshaped stream is read in the stream's shape alone."""
    if not is_add(node) or is_mutation(node):
        return False
    sources = [s for a in node.args if isinstance(a, fx.Node) and (s := _source(a)) is not None]
    mine, wide = shape_of(node), shape_of(sources[0]) if len(sources) == 1 else None
    if mine is None or wide is None or len(mine) >= len(wide) or not node.users:
        return False
    return all(operation(u) in _RESHAPES and shape_of(u) == wide for u in node.users)


def _source(node: fx.Node) -> fx.Node | None:
    """Return what a node is a reshaped form of."""
    reshaped = node.op == "call_method" and operation(node) in _RESHAPES
    source = node.args[0] if reshaped else None
    return source if isinstance(source, fx.Node) else None
