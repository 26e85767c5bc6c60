"""Which operation of a piece is its attention, and what its windows can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from ..errors import UnsupportedError
from ..partition.outer import Piece

ATTEND = torch.ops.adaskip.attend.default
CAUSAL, PACKED = torch.ops.adaskip.attend_causal.default, torch.ops.adaskip.attend_packed.default
WINDOWED = torch.ops.adaskip.attend_windowed.default
PACKED_WINDOWED = torch.ops.adaskip.attend_packed_windowed.default
_ATTENTIONS = frozenset(
    [ATTEND, CAUSAL, PACKED, WINDOWED, PACKED_WINDOWED, scaled_dot_product_attention]
)


@dataclass(frozen=True)
class Attention:
    """The one attention of a piece.

    Attributes:
        kv_heads: How many K/V heads it has.
        sees: ``everything`` up to the query, or ``less``: the model hides tokens itself.
    """

    kv_heads: int
    sees: Literal["everything", "less"]


def attention_of(piece: Piece) -> Attention:
    """Return what is known of a piece's attention.

    Raises:
        UnsupportedError: It has none that can have a window.
    """
    node = attention_node(piece)
    _, key, *_ = node.args
    masked = node.kwargs.get("attn_mask") is not None or node.target in (WINDOWED, PACKED_WINDOWED)
    return Attention(int(example_of(key).shape[1]), "less" if masked else "everything")


def attention_node(piece: Piece) -> fx.Node:
    """Return the operation in a piece that is its attention.

    Raises:
        UnsupportedError: There is none, or more than one.
    """
    graph = piece.module.graph
    found: list[fx.Node] = [
        n for n in graph.nodes if n.op == "call_function" and n.target in _ATTENTIONS
    ]
    if len(found) != 1:
        what = "none of PyTorch's" if not found else f"{len(found)} of them"
        raise UnsupportedError(
            f"layer {piece.layer}'s {piece.kind} cannot have a window: its attention is {what} "
            "(it is written out, for a soft cap, sinks of its own or a bias, or it is no attention)"
        )
    return found[0]


def example_of(node: Any) -> torch.Tensor:
    """Return the example (fake) value of a node that is a tensor."""
    value = node.meta["example_value"]
    assert isinstance(value, torch.Tensor)
    return value
