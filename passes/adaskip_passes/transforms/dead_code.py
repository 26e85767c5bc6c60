"""Remove nodes that nobody needs, keeping in-place writes.

``fx.Graph.eliminate_dead_code(is_impure_node=...)``, which torch 2.11 has as well, is not used: it
calls itself on subgraphs (of an autocast or a higher-order operator) without ``is_impure_node``,
which erases their writes; it lints first, which takes ten times as long as the removal and is done
by the pass manager already; and it does not say how many nodes it erased.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from ..analysis.effects import is_mutation
from ..infra.pass_base import Pass, PassResult


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Pass over any graph: `eliminate_dead_code`. Its changes are erased nodes.

    Attributes:
        keep: True for a node that stays even when nothing reads its value.
        placeholders: Whether inputs that nothing reads are erased as well.
    """

    keep: Callable[[fx.Node], bool] = is_mutation
    placeholders: bool = False

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Erase the nodes; see :class:`Pass`."""
        erased = eliminate_dead_code(graph_module.graph, self.keep, placeholders=self.placeholders)
        return PassResult(graph_module, erased)


def eliminate_dead_code(
    graph: fx.Graph, keep: Callable[[fx.Node], bool] = is_mutation, *, placeholders: bool = False
) -> int:
    """Erase every node without users, except those that `keep` says have an effect.

    Before::                                After::

        y = linear(x, w)                        keys.copy_(k)
        keys.copy_(k)                           return x
        return x

    Legal because a node without users and without effects cannot be observed. ``graph.
    eliminate_dead_code()`` of FX would erase ``copy_`` as well.

    Args:
        graph: changed in place.
        keep: True for a node that stays even when nothing reads its value.
        placeholders: also erase inputs that nothing reads.

    Returns:
        How many nodes were erased.
    """
    erased = 0
    for node in reversed(list(graph.nodes)):
        removable = node.op not in ("placeholder", "output") or (
            placeholders and node.op == "placeholder"
        )
        if removable and not node.users and not keep(node):
            graph.erase_node(node)
            erased += 1
    return erased
