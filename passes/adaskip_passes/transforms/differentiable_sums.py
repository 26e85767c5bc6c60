"""Make a flat graph of one of several ranks one that gradients flow through: its sums over ranks.

Before::                                        After::

    total = wait_tensor(all_reduce(x, "sum"))   total = _Sum(x)

Not every torch has a gradient of a captured sum, and without one it is wrong and nobody says so. As
a function of what all ranks give to it, a sum is its own adjoint: what a rank gave counts for the
results of all, so gradients are summed over the ranks as well. Where each rank has a share of the
head, whose logits are gathered as a ``DTensor`` (the gradient of which is the rank's share), each
rank then has a part of the gradient, and they add up to all of it. Where each rank has the whole
head, and so the same loss, they add up to as many times that, and the gradient of the output is
divided by the number of ranks.

Legal where sums are all that ranks exchange between their surrogates and the head; else refused.
The values are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..analysis.effects import operation
from ..errors import UnsupportedError
from ..infra.pass_base import Pass, PassResult


@dataclass(frozen=True)
class DifferentiableSums(Pass):
    """Pass over a flat graph: sums over ranks that gradients flow through.

    Its changes are sums, and the output if its gradient is divided.

    Attributes:
        ranks: How many there are.
    """

    ranks: int

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Replace the sums; see :class:`Pass`.

        Raises:
            UnsupportedError: Ranks exchange something else.
        """
        graph = graph_module.graph
        order = {node: i for i, node in enumerate(graph.nodes)}
        sums = [node for node in graph.nodes if _is_sum(node)]
        gathers = [order[n] for n in graph.nodes if operation(n) == "redistribute"]
        ends = (order[sums[0]], order[sums[-1]]) if sums else (0, 0)
        between = [at for at in gathers if ends[0] < at < ends[1]]
        known = {*sums, *(node for node in graph.nodes if _is_waited(node))}
        if between or any("c10d" in str(n.target) for n in graph.nodes if n not in known):
            raise UnsupportedError(
                "ranks exchange more than sums between the layers of this model, and gradients do "
                "not flow through that"
            )
        for node in sums:
            _replace(graph, node)
        whole = not any(at > ends[1] for at in gathers)
        if whole:
            _divide(graph, self.ranks)
        return PassResult(graph_module, len(sums) + whole)


class _Sum(torch.autograd.Function):
    """A sum over ranks, whose gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return _torch.all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _torch.all_reduced(gradients[0].contiguous(), ctx.group), None


class _Divided(torch.autograd.Function):
    """The same values, whose gradient is divided by a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, number: int) -> torch.Tensor:
        ctx.number = number
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] / ctx.number, None


def summed(x: torch.Tensor, group: str) -> torch.Tensor:
    """Return the sum of all ranks' `x`."""
    total: torch.Tensor = _Sum.apply(x, group)  # type: ignore[no-untyped-call]
    return total


def divided(x: torch.Tensor, number: int) -> torch.Tensor:
    """Return `x`, whose gradient is divided by a number."""
    same: torch.Tensor = _Divided.apply(x, number)  # type: ignore[no-untyped-call]
    return same


def _is_sum(node: fx.Node) -> bool:
    known = operation(node) == "all_reduce" and len(node.args) == 3 and not node.kwargs
    return known and node.args[1] == "sum" and all(map(_is_waited, node.users))


def _is_waited(node: fx.Node) -> bool:
    return operation(node) == "wait_tensor"


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        total = graph.call_function(summed, (node.args[0], node.args[2]))
    total.meta = dict(node.meta)
    for waited in list(node.users):
        waited.replace_all_uses_with(total)
        graph.erase_node(waited)
    graph.erase_node(node)


def _divide(graph: fx.Graph, number: int) -> None:
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    (first, *rest) = output.args[0]
    with graph.inserting_before(output):
        same = graph.call_function(divided, (first, number))
    output.args = ((same, *rest),)
