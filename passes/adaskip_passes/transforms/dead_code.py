"""Remove nodes nobody needs, keeping in-place writes."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ..analysis.effects import is_mutation


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
