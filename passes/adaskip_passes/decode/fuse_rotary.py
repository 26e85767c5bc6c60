"""Inner pass for a decode step: attention rotates its queries and new keys itself.

Before::

    q2 = q * cos + cat((-q[..., D / 2 :], q[..., : D / 2])) * sin
    k2 = k * cos + cat((-k[..., D / 2 :], k[..., : D / 2])) * sin
    y = store_and_attend(q2, keys, values, k2, v, None, None, bounds)

After::

    y = store_and_attend(q, keys, values, k, v, cos, sin, bounds)

and likewise of a latent cache, where the rest of a key is rotated, beside the latent.

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
from .matching import example, find_overwritten, shape_of, two_parts
from .rotary import rotation

_ATTEND = torch.ops.adaskip.store_and_attend.default
_ATTEND_LATENT = torch.ops.adaskip.store_and_attend_latent.default


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Pass over the graph of a piece. Its changes are attentions that rotate, and erased nodes."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Fuse rotary embeddings into the attention that reads them; see :class:`Pass`."""
        graph = graph_module.graph
        overwritten = find_overwritten(graph)
        fused = [
            node
            for target in (_ATTEND, _ATTEND_LATENT)
            for node in graph.find_nodes(op="call_function", target=target)
            if not node.kwargs and _fuse(node, overwritten)
        ]
        erased = eliminate_dead_code(graph) if fused else 0
        return PassResult(graph_module, len(fused) + erased)


def _fuse(attend: fx.Node, overwritten: set[fx.Node]) -> bool:
    """Let `attend` rotate; returns False where it may not."""
    query, keys, values, new_keys, new_values, *angles = attend.args[:7]
    rest, latent = attend.args[7:11], attend.target is _ATTEND_LATENT
    parts = two_parts(query) if latent and isinstance(query, fx.Node) else None
    turned, new = (parts[1] if parts else None, new_values) if latent else (query, new_keys)
    if angles != [None, None] or not isinstance(turned, fx.Node) or not isinstance(new, fx.Node):
        return False
    of_query, of_keys = rotation(turned), rotation(new)
    if of_query is None or of_keys is None or of_query[1:] != of_keys[1:]:
        return False
    cosines, sines = of_query.cosines, of_query.sines
    if shape_of(cosines) != shape_of(sines) or (of_query.unzipped and not latent):
        return False
    if not overwritten.isdisjoint((of_query.x, of_keys.x, cosines, sines)):
        return False
    if latent and of_query.rotary_dim != (shape_of(of_keys.x) or (0,))[-1]:
        return False
    with attend.graph.inserting_before(attend):
        both = _parts_of(attend.graph, cosines) if _is_complex(cosines) else (cosines, sines)
        if parts is not None:
            query = attend.graph.call_function(torch.cat, ((parts[0], of_query.x), -1))
            query.meta["example_value"] = example(attend.args[0])
    if latent:
        new_values = of_keys.x
    else:
        query, new_keys = of_query.x, of_keys.x
        rest = *rest, of_query.rotary_dim
    kind = (of_query.interleaved, of_query.unzipped)[: 2 if latent else 1]
    attend.args = (query, keys, values, new_keys, new_values, *both, *rest, *kind)
    return True


def _is_complex(angles: fx.Node) -> bool:
    value = example(angles)
    return value is not None and value.is_complex()


def _parts_of(graph: fx.Graph, angles: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the real and the imaginary parts of complex numbers, where they are."""
    value = example(angles)
    assert value is not None
    numbers = graph.call_function(torch.view_as_real, (angles,))
    numbers.meta["example_value"] = torch.view_as_real(value)
    parts = []
    for i in range(2):
        part = graph.call_function(torch.select, (numbers, -1, i))
        part.meta["example_value"] = numbers.meta["example_value"].select(-1, i)
        parts.append(part)
    return parts[0], parts[1]
