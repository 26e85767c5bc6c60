"""Pieces that stand in for a skipped sublayer, from one factor to a linear map.

A surrogate is data, not code: its tensors are inputs of the outer graph, so one compiled piece
serves every sublayer, whatever was fitted for it. Each kind is a function of a token's stream
alone; it stores nothing and reads no other token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.nn.functional import linear as apply_linear

from ..partition.outer import Piece, helper_piece

EPS = 1e-6  #: under the root of a mean square
SURROGATE = "adaskip_surrogate"  # marks an input: (position of the sublayer, name of the tensor)


@dataclass(frozen=True)
class SurrogateKind:
    """A kind of surrogate.

    Attributes:
        compute: Makes its nodes, from those of the stream [batch, tokens, hidden] and its tensors.
        shapes: From hidden size and rank to the shapes of its tensors, by name.
        wide: Whether its tensors are float32 whatever the stream is (else they are like it).

    """

    compute: Callable[..., fx.Node]
    shapes: Callable[[Any, int], Mapping[str, tuple[Any, ...]]]
    wide: bool = False


def _multiplied(x: fx.Node, factor: fx.Node) -> fx.Node:
    """Compute ``factor * x`` in float32: one factor (AdaSkip eq. 4), or one for each channel."""
    graph, dtype = x.graph, x.meta["example_value"].dtype
    if dtype == torch.float32:
        return graph.call_function(torch.mul, (x, factor))
    wide = graph.call_method("to", (x, torch.float32))
    return graph.call_method("to", (graph.call_function(torch.mul, (wide, factor)), dtype))


def _linear(x: fx.Node, weight: fx.Node, bias: fx.Node) -> fx.Node:
    """Compute ``x + x W^T + b`` (NBL, arXiv 2505.21077)."""
    return _added(x, x, weight, bias)


def _normalized(x: fx.Node, weight: fx.Node, bias: fx.Node) -> fx.Node:
    """Compute ``x + (x / rms(x)) W^T + b``; the root mean square is taken in float32."""
    graph, dtype = x.graph, x.meta["example_value"].dtype
    wide = graph.call_method("to", (x, torch.float32))
    mean = graph.call_method("mean", (graph.call_method("pow", (wide, 2)), -1), {"keepdim": True})
    factor = graph.call_function(torch.rsqrt, (graph.call_function(torch.add, (mean, EPS)),))
    normal = graph.call_method("to", (graph.call_function(torch.mul, (wide, factor)), dtype))
    return _added(x, _like(normal, x), weight, bias)


def _low_rank(x: fx.Node, down: fx.Node, up: fx.Node, bias: fx.Node) -> fx.Node:
    """Compute ``x + (x D^T) U^T + b``."""
    inner = x.graph.call_function(apply_linear, (x, down))
    example, rank = x.meta["example_value"], down.meta["example_value"].shape[0]
    inner.meta["example_value"] = example.new_empty((*example.shape[:-1], rank))
    return _added(x, inner, up, bias)


def _added(x: fx.Node, source: fx.Node, weight: fx.Node, bias: fx.Node) -> fx.Node:
    """Compute ``x + source W^T + b``."""
    branch = _like(x.graph.call_function(apply_linear, (source, weight, bias)), x)
    return _like(x.graph.call_function(torch.add, (x, branch)), x)


def _like(node: fx.Node, x: fx.Node) -> fx.Node:
    """Give a node a value of the stream's shape and dtype, which lowering passes look at."""
    node.meta["example_value"] = x.meta["example_value"]
    return node


SURROGATES: Mapping[str, SurrogateKind] = MappingProxyType(
    {
        "scale": SurrogateKind(_multiplied, lambda hidden, rank: {"factor": ()}, wide=True),
        "diagonal": SurrogateKind(
            _multiplied, lambda hidden, rank: {"factor": (hidden,)}, wide=True
        ),
        "linear": SurrogateKind(
            _linear, lambda hidden, rank: {"weight": (hidden, hidden), "bias": (hidden,)}
        ),
        "normalized": SurrogateKind(
            _normalized, lambda hidden, rank: {"weight": (hidden, hidden), "bias": (hidden,)}
        ),
        "low_rank": SurrogateKind(
            _low_rank,
            lambda hidden, rank: {"down": (rank, hidden), "up": (hidden, rank), "bias": (hidden,)},
        ),
    }
)


def surrogate_examples(kind: str, rank: int, stream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return example (fake) values of a surrogate's tensors, by name, for such a stream."""
    found = SURROGATES[kind]
    dtype = torch.float32 if found.wide else stream.dtype
    shapes = found.shapes(stream.shape[-1], rank)
    return {name: stream.new_empty(shape, dtype=dtype) for name, shape in shapes.items()}


def surrogate_piece(
    kind: str, rank: int, stream: torch.Tensor, lengths: Sequence[fx.Node]
) -> Piece:
    """Return the piece for one kind of surrogate.

    Args:
        kind: a key of `SURROGATES`.
        rank: of ``"low_rank"``; 0 otherwise.
        stream: example (fake) value of the residual stream.
        lengths: see :func:`helper_piece`.
    """
    tensors = surrogate_examples(kind, rank, stream)
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = stream
    inputs = []
    for name, tensor in tensors.items():
        inputs.append(graph.placeholder(name))
        inputs[-1].meta["example_value"] = tensor
    graph.output(SURROGATES[kind].compute(x, *inputs))
    return helper_piece(
        piece_name(kind, rank), "surrogate", graph, [stream, *tensors.values()], lengths
    )


def piece_name(kind: str, rank: int) -> str:
    """Return what a surrogate's piece is called in an outer graph."""
    return f"{kind}_{rank}" if rank else kind
