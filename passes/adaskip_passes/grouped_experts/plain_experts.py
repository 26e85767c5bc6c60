"""Experts of many tokens in plain torch, which gradients flow through.

Before::                                        After::

    x = gather_grouped(h, o, k)                     x = gathered_rows(h, o, k)
    y = gate_grouped(x, b, e, ...)                  y = gated_rows(x, b, e, ...)
    z = sum_grouped(y, p, c, s, b)                  z = summed_rows(y, p, c, s, b)

The operators have kernels and no gradients. What takes their place computes the same, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from ..infra.pass_base import Pass, PassResult
from .ops import gated_rows, gathered_rows, summed_rows

_PLAIN: Mapping[Any, Callable[..., torch.Tensor]] = MappingProxyType(
    {
        torch.ops.adaskip.gather_grouped.default: gathered_rows,
        torch.ops.adaskip.gate_grouped.default: gated_rows,
        torch.ops.adaskip.sum_grouped.default: summed_rows,
    }
)


@dataclass(frozen=True)
class PlainExperts(Pass):
    """Pass over a flat graph: operators of experts become functions of plain torch.

    Its changes are operators.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Exchange the operators; see :class:`Pass`."""
        changes = 0
        for target, plain in _PLAIN.items():
            for node in graph_module.graph.find_nodes(op="call_function", target=target):
                node.target = plain
                changes += 1
        return PassResult(graph_module, changes)
