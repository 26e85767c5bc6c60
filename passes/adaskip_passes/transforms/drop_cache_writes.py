"""Make a flat graph one that gradients flow through: without its writes to a cache.

Before::                                    After::

    k = linear(h, w)                            k = linear(h, w)
    keys.copy_(k)                               y = attention(q, k, v)
    torch._C._set_grad_enabled(False)           return (y,)
    y = attention(q, k, v)
    return (y,)

Legal for a graph that does not read what it stores (a prompt on an empty cache attends to the
fresh keys and values); another one is refused. The results are the same; the cache stays empty.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..analysis.effects import accesses, operation, storage_root, written
from ..errors import UnsupportedError
from ..infra.pass_base import Pass, PassResult
from ..infra.pass_manager import run_passes
from .dead_code import eliminate_dead_code


@dataclass(frozen=True)
class DropCacheWrites(Pass):
    """Pass over a flat graph: remove the writes to its inputs, and switches of gradients.

    Its changes are erased nodes.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Remove the writes; see :class:`Pass`.

        Raises:
            UnsupportedError: The graph reads an input again that it has written to.
        """
        graph = graph_module.graph
        nodes = list(graph.nodes)
        for position, node in enumerate(nodes):
            root = _stored_to(node)
            if root is not None:
                _check_unread(node, root, nodes[position + 1 :])
        switches = [node for node in nodes if operation(node) == "_set_grad_enabled"]
        for node in switches:
            graph.erase_node(node)
        erased = eliminate_dead_code(
            graph, keep=lambda n: written(n) is not None and _stored_to(n) is None
        )
        return PassResult(graph_module, len(switches) + erased)


def differentiable(flat: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a flat graph without writes to its inputs, which autograd can run.

    Raises:
        UnsupportedError: It reads an input again that it has written to.
    """
    return run_passes(flat, (DropCacheWrites(),))


def _stored_to(node: fx.Node) -> fx.Node | None:
    """Return the input of the graph that a node writes to."""
    root = written(node)
    return root if root is not None and root.op == "placeholder" else None


def _check_unread(node: fx.Node, root: fx.Node, later: list[fx.Node]) -> None:
    for other in accesses(later, root):
        if storage_root(other) is not root:  # views and further writes have this root
            raise UnsupportedError(
                f"{other.name} reads {root.name}, which {node.name} has written to in the same "
                "step: gradients cannot be taken of that"
            )
