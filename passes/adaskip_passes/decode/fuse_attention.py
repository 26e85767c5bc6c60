"""Inner pass for a decode step: new keys and values are stored by the attention that reads them.

Before::                                    After::

    store(keys, k, position)                    y = store_and_attend(q, keys, values, k, v, bounds)
    store(values, v, position)
    y = attend(q, keys, values, bounds)

Two kernels less a layer. Legal where nothing else reads or writes the two buffers: then no order
among them is lost. The new tokens are stored where the bounds say that the queries are, which is
where `position` is: a capture makes both of one tensor. Results are the same to rounding: a kernel
may look at the new tokens after the stored ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..analysis.effects import accesses
from ..infra.pass_base import Pass, PassResult
from . import latent_ops as latent_ops  # registers its operators

_STORE, _ATTEND = torch.ops.adaskip.store.default, torch.ops.adaskip.attend.default
_ATTEND_LATENT = torch.ops.adaskip.attend_latent.default
#: The operators that store as well.
_STORING = {
    _ATTEND: torch.ops.adaskip.store_and_attend.default,
    _ATTEND_LATENT: torch.ops.adaskip.store_and_attend_latent.default,
}


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Pass over the graph of a piece. Its changes are attentions that store."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Fuse stores into the attention that reads what they wrote; see :class:`Pass`."""
        graph, changes = graph_module.graph, 0
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _STORING and not node.kwargs:
                query, keys, values, *rest = node.args
                stores = [_only_store(graph, buffer, node) for buffer in (keys, values)]
                if None in stores or stores[0].args[2] is not stores[1].args[2]:  # type: ignore[union-attr]
                    continue
                new = [store.args[1] for store in stores if store is not None]
                node.target = _STORING[node.target]
                node.args = (query, keys, values, *new, None, None, *rest)  # without angles
                for store in stores:
                    if store is not None:
                        graph.erase_node(store)
                changes += 1
        return PassResult(graph_module, changes)


def _only_store(graph: fx.Graph, buffer: object, attend: fx.Node) -> fx.Node | None:
    """Return the store to a buffer that nothing but it and `attend` has to do with."""
    if not isinstance(buffer, fx.Node) or buffer.op != "placeholder":
        return None
    first, *others = accesses(graph.nodes, buffer) or [attend]
    if others != [attend] or first.target is not _STORE or first.kwargs or first.users:
        return None
    return first if first.args[0] is buffer else None
