"""Pieces that stand in for a skipped sublayer.

A compensation is data, not code: its tensors are inputs of the outer graph, so one compiled piece
serves every factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import fx

from .outline import Piece, helper_piece


def scale(x: fx.Node, factor: fx.Node) -> fx.Node:
    """``b_hat = factor * a`` (AdaSkip eq. 4), computed in float32.

    Args:
        x: residual stream [batch, tokens, hidden], any floating type.
        factor: float32 tensor without dimensions.
    """
    graph, dtype = x.graph, x.meta["example_value"].dtype
    if dtype == torch.float32:
        return graph.call_function(torch.mul, (x, factor))
    wide = graph.call_method("to", (x, torch.float32))
    return graph.call_method("to", (graph.call_function(torch.mul, (wide, factor)), dtype))


#: kind -> (names of its tensors, what it computes)
COMPENSATIONS: Mapping[str, tuple[tuple[str, ...], Callable[..., fx.Node]]] = MappingProxyType(
    {"scale": (("factor",), scale)}
)


def compensation_piece(
    kind: str,
    stream: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    lengths: Sequence[fx.Node],
) -> Piece:
    """The piece for one kind of compensation.

    Args:
        kind: a key of `COMPENSATIONS`.
        stream: example (fake) value of the residual stream.
        tensors: example values of the kind's tensors, by name.
        lengths: see :func:`helper_piece`.
    """
    names, compute = COMPENSATIONS[kind]
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = stream
    graph.output(compute(x, *(graph.placeholder(name) for name in names)))
    examples = [stream, *(tensors[name] for name in names)]
    return helper_piece(kind, "compensation", graph, examples, lengths)
