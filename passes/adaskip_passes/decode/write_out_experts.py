"""Inner pass for a step of one token on a CPU: its experts are written out.

Before::                                             After::

    y = adaskip.run_experts(x, chosen, ...)          y = (silu(g) * u of up[chosen] and x) ...

An operator of ours is a call, and what it calls are calls as well: of a step of one token they take
longer than the products. Written out, a compiler makes loops of it that read the weights of the
experts that were chosen where they are. Legal because the same numbers are multiplied and added, in
float32, and rounded where the operator rounds; their order may be another one, so the pass
preserves results to rounding.

Steps of more tokens are left alone: there each expert's weights are read once, whichever of the
tokens chose it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..infra.pass_base import Pass, PassResult
from .expert_ops import gated
from .matching import calls, shape_of


@dataclass(frozen=True)
class WriteOutExperts(Pass):
    """Pass over the graph of a piece, whose nodes carry their example values.

    Its changes are operators that were written out.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Write them out; see :class:`Pass`."""
        changes = 0
        for node in graph_module.graph.nodes:
            if calls(node, "run_experts.default", "run_experts") and _is_one_token(node):
                node.target = experts_of_one
                changes += 1
        return PassResult(graph_module, changes)


def _is_one_token(node: fx.Node) -> bool:
    first = node.args[0] if node.args else None
    shape = shape_of(first) if isinstance(first, fx.Node) else None
    return shape is not None and isinstance(shape[0], int) and shape[0] == 1


def experts_of_one(
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    transposed: bool,
    interleaved: bool,
    clamp: float,
    alpha: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return what `run_experts` does, of one token [1, H]."""
    numbers = chosen[0]
    known = (numbers >= 0) & (numbers < up.shape[0])
    numbers = torch.where(known, numbers, 0)
    both = _products(hidden, up[numbers], transposed)
    if up_bias is not None:
        both = both + up_bias[numbers]
    outputs = _products(gated(both, interleaved, clamp, alpha), down[numbers], transposed)
    if down_bias is not None:
        outputs = outputs + down_bias[numbers]
    weighted = outputs * torch.where(known, shares[0], 0).unsqueeze(1)
    result = weighted.sum(0, keepdim=True).to(hidden.dtype)
    return result if residual is None else result + residual.view_as(result)


def _products(x: torch.Tensor, weights: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Return products of rows [k or 1, n] with a matrix each, as `linear` has them; [k, m]."""
    dim = 1 if transposed else 2
    wide = x.float().unsqueeze(3 - dim) * weights.float()
    return wide.sum(dim).to(x.dtype)
