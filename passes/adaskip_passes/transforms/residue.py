"""What is left of a sublayer of which only effects are kept.

Before (a piece)::                          After, of which ``everything`` is kept::

    k, v = linear(x, wk), linear(x, wv)         k, v = linear(x, wk), linear(x, wv)
    keys.copy_(k)                               keys.copy_(k)
    values.copy_(v)                             values.copy_(v)
    length.add_(1)                              length.add_(1)
    return x + attention(q, keys, values)       return ()

``counters`` keeps ``length.add_(1)`` alone, which does not depend on the stream. Legal because
every write that stays has the operands that it had, and who asks for less has no use for the
others.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from torch import fx

from ..analysis.effects import accesses, is_mutation, written
from ..analysis.stream import stream_independent
from ..analysis.symbolic_lengths import describing
from ..infra.pass_base import Pass, PassResult
from ..infra.pass_manager import run_passes
from .dead_code import eliminate_dead_code

Keep = Literal["nothing", "counters", "everything"]


@dataclass(frozen=True)
class Residue(Pass):
    """Pass over a sublayer's piece: leave effects alone, and no result. Its changes are nodes.

    Attributes:
        keep: Which effects stay; see :class:`adaskip_passes.Replacement`.
    """

    keep: Keep

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Erase what the effects do not need; see :class:`Pass`."""
        graph = graph_module.graph
        graph.output_node().args = ((),)
        stream = next(iter(graph.nodes))
        free = stream_independent(graph, stream)

        def kept(node: fx.Node) -> bool:
            root = written(node)
            if root is None:
                return False
            if root.op != "placeholder":  # it changes a value that something kept may read
                later = itertools.takewhile(lambda n: n is not node, reversed(graph.nodes))
                return bool(accesses(later, root))
            return self.keep == "everything" or node in free

        erased = eliminate_dead_code(graph, keep=kept)
        symbols = describing(graph)
        erased += eliminate_dead_code(graph, lambda n: kept(n) or n in symbols, placeholders=True)
        return PassResult(graph_module, 1 + erased)


def residue(module: fx.GraphModule, keep: Keep) -> fx.GraphModule | None:
    """Return what is left of a sublayer, or None if nothing is.

    Args:
        module: A sublayer's piece, which is not changed; its first input is the stream.
        keep: Which effects stay; see :class:`adaskip_passes.Replacement`.
    """
    left = run_passes(module, (Residue(keep),))
    return left if any(is_mutation(n) for n in left.graph.nodes) else None
