"""Inner pass for a decode step: attention rotates its queries and new keys itself.

Before::

    q2 = q * cos + cat((-q[..., D / 2 :], q[..., : D / 2])) * sin
    k2 = k * cos + cat((-k[..., D / 2 :], k[..., : D / 2])) * sin
    y = store_and_attend(q2, keys, values, k2, v, None, None, bounds)

After::

    y = store_and_attend(q, keys, values, k, v, cos, sin, bounds)

A kernel less a layer, and one that no other may overlap with. Rotary embeddings (Su et al.,
"RoFormer", eq. 34) of all of a head or of its first numbers are recognized in the forms that
:mod:`rotary` lists; others stay. Legal because the same values are computed from the same operands;
they are rounded once instead of three times, so the pass preserves results to rounding, not to the
bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..infra.pass_base import Pass, PassResult
from ..transforms.dead_code import eliminate_dead_code
from .matching import find_overwritten, shape_of
from .rotary import rotation

_ATTEND = torch.ops.adaskip.store_and_attend.default


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Pass over the graph of a piece. Its changes are attentions that rotate, and erased nodes."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Fuse rotary embeddings into the attention that reads them; see :class:`Pass`."""
        graph = graph_module.graph
        overwritten = find_overwritten(graph)
        fused = [n for n in graph.find_nodes(op="call_function", target=_ATTEND) if not n.kwargs]
        fused = [node for node in fused if _fuse(node, overwritten)]
        erased = eliminate_dead_code(graph) if fused else 0
        return PassResult(graph_module, len(fused) + erased)


def _fuse(attend: fx.Node, overwritten: set[fx.Node]) -> bool:
    """Let `attend` rotate; returns False where it may not."""
    query, keys, values, new_keys, new_values, *angles = attend.args[:7]
    rest = attend.args[7:11]
    if angles != [None, None]:
        return False
    if not isinstance(query, fx.Node) or not isinstance(new_keys, fx.Node):
        return False
    of_query, of_keys = rotation(query), rotation(new_keys)
    if of_query is None or of_keys is None or of_query[1:] != of_keys[1:]:
        return False
    cosines, sines = of_query.cosines, of_query.sines
    if shape_of(cosines) != shape_of(sines):
        return False
    if not overwritten.isdisjoint((of_query.x, of_keys.x, cosines, sines)):
        return False
    new = of_query.x, keys, values, of_keys.x, new_values, cosines, sines
    attend.args = (*new, *rest, of_query.rotary_dim, of_query.interleaved)
    return True
