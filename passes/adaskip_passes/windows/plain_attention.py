"""Attention of prompts by PyTorch's own alone, which gradients flow through.

Before::                                        After::

    y = attend_causal(q, k, v, scale)               y = causal(q, k, v, scale)
    z = attend_windowed(q, k, v, w, own, scale)     z = masked(q, k, v, w, own, scale)

The operators have kernels and no gradients. What takes their place computes the same, to rounding,
with a mask of all pairs where there is a window: for the lengths that one trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from ..attention.ops import causal
from ..infra.pass_base import Pass, PassResult
from .seen import attend_seen


def windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
    softcap: float = 0.0,
    sink_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what `ops.attend_windowed` does."""
    tokens, stored = query.shape[2], key.shape[2]
    position = torch.arange(stored, device=query.device)
    causal_mask = position <= position[stored - tokens :].unsqueeze(1)
    more = scale, softcap, sink_scores
    return masked_windowed(query, key, value, causal_mask[None, None], windows, *more, own=own)


def masked_windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    windows: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    sink_scores: torch.Tensor | None = None,
    own: int | None = None,
) -> torch.Tensor:
    """Return what `ops.attend_masked_windowed` does, of at most `own` tokens if that is given."""
    position = torch.arange(key.shape[2], device=query.device)
    last = torch.where(mask, position, -1).amax(-1, keepdim=True)
    near = mask
    if own is not None:
        near = near & (position > last - own)
    if windows is not None:
        first = torch.where(mask, position, key.shape[2]).amin((-2, -1), keepdim=True)
        table = windows.to(query.device).repeat_interleave(query.shape[1] // key.shape[1], 0)
        sinks, seen = table.view(1, -1, 1, 1, 2).unbind(-1)
        near = near & ((position > last - seen) | (position < first + sinks))
    return attend_seen(query, key, value, near, scale, softcap, sink_scores)


_OPERATORS = torch.ops.adaskip
_PLAIN: Mapping[Any, Callable[..., torch.Tensor]] = MappingProxyType(
    {
        _OPERATORS.attend_causal.default: causal,
        _OPERATORS.attend_windowed.default: windowed,
        _OPERATORS.attend_masked_windowed.default: masked_windowed,
    }
)


@dataclass(frozen=True)
class PlainAttention(Pass):
    """Pass over a flat graph: attention without gradients becomes PyTorch's.

    Its changes are attentions.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Exchange the operators; see :class:`Pass`."""
        changes = 0
        for node in graph_module.graph.nodes:
            plain = _PLAIN.get(node.target) if node.op == "call_function" else None
            if plain is not None:
                node.target = plain
                changes += 1
        return PassResult(graph_module, changes)
