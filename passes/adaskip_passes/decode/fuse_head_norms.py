"""Inner pass for a decode step: attention normalizes the heads of its queries and new keys itself.

Before::

    q2 = norm(q_weight, q)                              y = store_and_attend(q, ..., k, ...,
    k2 = norm(k_weight, k)                                  q_weight, k_weight, eps, offset)
    y = store_and_attend(q2, ..., k2, ...)

A kernel less a layer (Qwen3, Gemma 3, Dots). It comes after :class:`.fuse_rotary.FuseRotary`: a
rotation between the norm and the attention is the attention's by then, and one before the norm
stays where it is. Legal because the same values are computed from the same operands; they are
rounded once, so the pass preserves results to rounding.

Left alone are layer norms, norms of all heads together, heads that attention reads in two parts,
and queries whose norm differs from the keys' in more than its weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..infra.pass_base import Pass, PassResult
from ..transforms.dead_code import eliminate_dead_code
from .matching import argument, dtype_of, example, find_overwritten, shape_of
from .norms import Norm, norm_of

_ATTEND = torch.ops.adaskip.store_and_attend.default
_DEFAULTS = (0, False)  # rotary_dim and interleaved


@dataclass(frozen=True)
class FuseHeadNorms(Pass):
    """Pass over the graph of a piece. Its changes are attentions that normalize, and dead nodes."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Fuse norms into the attention that reads them; see :class:`Pass`."""
        graph = graph_module.graph
        overwritten = find_overwritten(graph)
        attends = graph.find_nodes(op="call_function", target=_ATTEND)
        fused = [n for n in attends if not n.kwargs and _fuse(n, overwritten)]
        erased = eliminate_dead_code(graph) if fused else 0
        return PassResult(graph_module, len(fused) + erased)


def _fuse(attend: fx.Node, overwritten: set[fx.Node]) -> bool:
    """Let `attend` normalize; returns False where it may not."""
    query, new_keys, rest = attend.args[0], attend.args[3], attend.args[11:]
    if len(rest) > len(_DEFAULTS) or not isinstance(query, fx.Node):
        return False
    if not isinstance(new_keys, fx.Node):
        return False
    of_query, of_keys = _norm(query), _norm(new_keys)
    if of_query is None or of_keys is None or of_query[2:] != of_keys[2:]:
        return False
    if not overwritten.isdisjoint((*of_query.inputs, *of_keys.inputs)):
        return False
    graph, (eps, offset) = attend.graph, of_query[2:4]
    with graph.inserting_before(attend):
        heads = [_heads(graph, norm) for norm in (of_query, of_keys)]
    form = (*rest, *_DEFAULTS[len(rest) :])
    norms = of_query.weight, of_keys.weight, eps, offset
    before, between = attend.args[1:3], attend.args[4:11]
    attend.args = (heads[0], *before, heads[1], *between, *form, *norms)
    return True


def _norm(heads: fx.Node) -> Norm | None:
    """Return the norm of heads [B, H, T, D], whose input is [B, T, H, D]; None if there is none."""
    normed = argument(heads, "transpose")
    if normed is None or heads.args[1:] not in ((1, 2), (2, 1)):
        return None
    found, shape = norm_of(normed), shape_of(heads)
    if found is None or found.centered or found.shift is not None or shape is None:
        return None
    dim = shape[-1]
    narrow = dtype_of(found.x) == dtype_of(heads)
    whole = isinstance(dim, int) and dim & (dim - 1) == 0
    return found if narrow and whole and shape_of(found.x) == shape_of(normed) else None


def _heads(graph: fx.Graph, norm: Norm) -> fx.Node:
    """Return the heads before their norm, [B, H, T, D]."""
    heads = graph.call_method("transpose", (norm.x, 1, 2))
    value = example(norm.x)
    heads.meta["example_value"] = None if value is None else value.transpose(1, 2)
    return heads
