"""Which operation of a piece is its attention, and what its windows can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from ..decode import latent_ops as latent_ops  # registers its operators
from ..decode.ops import EVERY
from ..errors import UnsupportedError
from ..partition.outer import Piece

ATTEND = torch.ops.adaskip.attend.default
#: Attention by a table of bounds; latent attention has one K/V head.
BY_BOUNDS = (ATTEND, torch.ops.adaskip.attend_latent.default)
CAUSAL, PACKED = torch.ops.adaskip.attend_causal.default, torch.ops.adaskip.attend_packed.default
WINDOWED = torch.ops.adaskip.attend_windowed.default
PACKED_WINDOWED = torch.ops.adaskip.attend_packed_windowed.default
MASKED_WINDOWED = torch.ops.adaskip.attend_masked_windowed.default
_ATTENTIONS = frozenset(
    [
        *(*BY_BOUNDS, CAUSAL, PACKED, WINDOWED, PACKED_WINDOWED, MASKED_WINDOWED),
        scaled_dot_product_attention,
    ]
)


@dataclass(frozen=True)
class Attention:
    """The one attention of a piece.

    Attributes:
        kv_heads: How many K/V heads it has.
        sees: ``everything`` up to the query, or ``less``: the model hides tokens itself.
        reads_windows: Whether, given a window, it reads what that shows and no more; attention with
            a mask of the model's own reads all.
    """

    kv_heads: int
    sees: Literal["everything", "less"]
    reads_windows: bool = True


def attention_of(piece: Piece) -> Attention:
    """Return what is known of a piece's attention.

    Raises:
        UnsupportedError: It has none that can have a window.
    """
    node = attention_node(piece)
    kv_heads = int(example_of(node.args[1]).shape[1])
    if node.target in (WINDOWED, PACKED_WINDOWED):
        own = node.args[4 if node.target is WINDOWED else 5]
        return Attention(kv_heads, "everything" if own == EVERY else "less")
    masked = node.target is MASKED_WINDOWED
    if node.target is scaled_dot_product_attention:
        masked = mask_of_torch(piece, node) is not None
    return Attention(kv_heads, "less" if masked else "everything", reads_windows=not masked)


def mask_of_torch(piece: Piece, node: fx.Node) -> fx.Node | None:
    """Return the mask of a call of PyTorch's own attention, [B or 1, 1, T, S]; None without.

    Raises:
        UnsupportedError: It is another one, or the call has arguments that are not known.
    """
    known = {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
    if len(node.args) != 3 or not node.kwargs.keys() <= known or node.kwargs.get("dropout_p"):
        raise UnsupportedError(
            f"layer {piece.layer}'s attention cannot have a window: it calls PyTorch's with "
            "arguments that are not known"
        )
    mask = node.kwargs.get("attn_mask")
    if mask is None:
        return None
    assert isinstance(mask, fx.Node)
    shape = example_of(mask)
    if shape.dtype != torch.bool or shape.dim() != 4 or shape.shape[1] != 1:
        raise UnsupportedError(
            f"layer {piece.layer}'s attention cannot have a window: its mask is a bias on scores, "
            "or differs by head"
        )
    return mask


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
            "(it is written out, for a bias of its own, or it is no attention)"
        )
    if found[0].target is scaled_dot_product_attention:
        mask_of_torch(piece, found[0])
    return found[0]


def example_of(node: Any) -> torch.Tensor:
    """Return the example (fake) value of a node that is a tensor."""
    value = node.meta["example_value"]
    assert isinstance(value, torch.Tensor)
    return value
