"""The rewrite: attention that runs sees a window, by K/V head.

Before::                                    After (a prompt)::

    x_1 = self.layers_0_attention(h, ...)       x_1 = self.layers_0_attention(h, ..., windows_0)

                                            After (a step on a static cache)::

                                                narrowed = self.bounds(bounds, windows)
                                                x_1 = self.layers_0_attention(h, narrowed[0], ...)

Like `Skip` this changes the result: it computes the function of an eager model whose mask in that
layer lets fewer keys through. What is stored stays as it was. The window is data: its sinks and
tokens are inputs of the outer graph, int64 [H_kv, 2] on the CPU for a prompt, and [layers, H_kv, 2]
on the device where attention reads a table of bounds. So any choice of layers, heads and windows
calls one piece more than the captured graph has, however many plans there are.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from ..analysis.structural_key import structural_key
from ..errors import UnsupportedError
from ..infra.graph_module import Uncoded
from ..infra.pass_base import Pass, PassResult
from ..partition.outer import PIECE, Piece, helper_piece, piece_of, sublayer_calls
from .ops import narrowed

WINDOWS = "adaskip_windows"  # marks an input: the positions of the sublayers whose windows it holds

_ATTEND = torch.ops.adaskip.attend.default
_CAUSAL, _PACKED = torch.ops.adaskip.attend_causal.default, torch.ops.adaskip.attend_packed.default
_ATTENTIONS = frozenset([_ATTEND, _CAUSAL, _PACKED, scaled_dot_product_attention])


@dataclass(frozen=True)
class Attention:
    """The one attention of a piece.

    Attributes:
        kv_heads: How many K/V heads it has.
        sees: ``everything`` up to the query, or ``what a mask says``.
    """

    kv_heads: int
    sees: Literal["everything", "what a mask says"]


@dataclass(frozen=True)
class WindowAttention(Pass):
    """Pass over an outer graph: attention gets windows. Its changes are sublayers.

    Run it before `Skip`, whose dead code takes what nothing reads any more.

    Attributes:
        sublayers: Positions along the stream of attention that has a window.
    """

    sublayers: tuple[int, ...] = ()

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Give the windows; see :class:`Pass`.

        Raises:
            UnsupportedError: A sublayer is not in the graph, or its attention cannot be narrowed.
        """
        outer, calls = graph_module, sublayer_calls(graph_module.graph)
        made: dict[str, Piece] = {}
        by_bounds: dict[fx.Node, list[fx.Node]] = {}
        for index in self.sublayers:
            if index not in calls:
                raise UnsupportedError(f"sublayer {index} is not in the graph: it sees nothing")
            piece = piece_of(calls[index])
            assert piece is not None
            node = attention_node(piece)
            if node.target is not _ATTEND:
                _narrow_in_piece(outer, calls[index], piece, node, made)
                continue
            bounds = calls[index].args[_bounds_input(piece, node)]
            assert isinstance(bounds, fx.Node)
            by_bounds.setdefault(bounds, []).append(calls[index])
        for bounds, windowed in by_bounds.items():
            for alike in _by_heads(windowed):
                _narrow_bounds(outer, bounds, alike, made)
        return PassResult(outer, len(self.sublayers))


def window_inputs(outer: fx.Graph) -> dict[str, tuple[int, ...]]:
    """Return the inputs that hold windows: by name the positions of their sublayers."""
    marked = ((n.name, n.meta.get(WINDOWS)) for n in outer.find_nodes(op="placeholder"))
    return {name: mark for name, mark in marked if mark is not None}


def attention_of(piece: Piece) -> Attention:
    """Return what is known of a piece's attention.

    Raises:
        UnsupportedError: It has none that can have a window.
    """
    node = attention_node(piece)
    _, key, *_ = node.args
    masked = node.target is scaled_dot_product_attention and node.kwargs.get("attn_mask")
    sees: Any = "what a mask says" if masked is not None and masked is not False else "everything"
    return Attention(int(_example(key).shape[1]), sees)


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


def _example(node: Any) -> torch.Tensor:
    value = node.meta["example_value"]
    assert isinstance(value, torch.Tensor)
    return value


# In prompts --------------------------------------------------------------------------------------


def _narrow_in_piece(
    outer: fx.GraphModule, call: fx.Node, piece: Piece, node: fx.Node, made: dict[str, Piece]
) -> None:
    """Have a piece take its window as one more input."""
    example = _example(node.args[0]).new_empty(
        (_example(node.args[1]).shape[1], 2), dtype=torch.int64, device="cpu"
    )
    windowed = made.get(piece.key)
    if windowed is None:
        windowed = made[piece.key] = _with_window(piece, node, example)
    table = _new_input(outer.graph, f"windows_{piece.index}", example, (piece.index,))
    call.args = (*call.args, table)
    _call_instead(outer, call, replace(piece, module=windowed.module, key=windowed.key))


def _with_window(piece: Piece, attention: fx.Node, example: torch.Tensor) -> Piece:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(piece.module.graph, copies))
    node, last = copies[attention], graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        windows = graph.placeholder("windows")
    windows.meta["example_value"] = example
    query, key, value, *more = node.args
    with graph.inserting_before(node):
        if node.target is _CAUSAL:
            target, given = torch.ops.adaskip.attend_windowed.default, (windows, *more)
        elif node.target is _PACKED:
            offsets, *rest = more
            target = torch.ops.adaskip.attend_packed_windowed.default
            given = (offsets, windows, *rest)
        else:
            target, given = _of_torch(piece, node, windows)
        new = graph.call_function(target, (query, key, value, *given))
        result = new
        if node.target is scaled_dot_product_attention:
            result = graph.call_method("transpose", (new, 1, 2))
    if "example_value" in node.meta:
        result.meta["example_value"] = node.meta["example_value"]
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    module = Uncoded(piece.module, graph, "Piece")
    return replace(piece, module=module, key=structural_key(module))


def _of_torch(piece: Piece, node: fx.Node, windows: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """Return the operator for what PyTorch's own attention does, and what it takes besides."""
    known = {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
    options = dict(node.kwargs)
    if len(node.args) > 3 or not options.keys() <= known or options.get("dropout_p"):
        raise UnsupportedError(
            f"layer {piece.layer}'s attention cannot have a window: it calls PyTorch's with "
            "arguments that are not known"
        )
    query = _example(node.args[0])
    scale, mask = options.get("scale"), options.get("attn_mask")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if mask is None:
        return torch.ops.adaskip.attend_windowed.default, (windows, scale)
    assert isinstance(mask, fx.Node)
    shape = _example(mask)
    if shape.dtype != torch.bool or shape.dim() != 4:
        raise UnsupportedError(
            f"layer {piece.layer}'s attention cannot have a window: its mask is a bias on scores"
        )
    return torch.ops.adaskip.attend_masked_windowed.default, (mask, windows, scale)


# On a static cache -------------------------------------------------------------------------------


def _bounds_input(piece: Piece, attention: fx.Node) -> int:
    """Return which input of a piece is the table of bounds."""
    bounds = attention.args[3]
    inputs = piece.module.graph.find_nodes(op="placeholder")
    if bounds not in inputs:
        raise UnsupportedError(
            f"layer {piece.layer}'s attention cannot have a window: it makes its own bounds"
        )
    return inputs.index(bounds)


def _by_heads(calls: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Return the calls whose attention has equally many K/V heads."""
    groups: dict[int, list[fx.Node]] = {}
    for call in calls:
        piece = piece_of(call)
        assert piece is not None
        groups.setdefault(attention_of(piece).kv_heads, []).append(call)
    return list(groups.values())


def _narrow_bounds(
    outer: fx.GraphModule, bounds: fx.Node, calls: Sequence[fx.Node], made: dict[str, Piece]
) -> None:
    """Give each of `calls` bounds of its own, computed together before the first of them."""
    pieces = [piece for call in calls if (piece := piece_of(call)) is not None]
    heads, example = attention_of(pieces[0]).kv_heads, _example(bounds)
    indices = tuple(piece.index for piece in pieces)
    shape = example.new_empty((len(calls), heads, 2))
    name = f"bounds_{indices[0]}"
    table = _new_input(outer.graph, f"windows_{indices[0]}", shape, indices)
    graph = fx.Graph()
    inputs = [graph.placeholder("bounds"), graph.placeholder("tables")]
    graph.output(graph.call_function(narrowed, tuple(inputs)))
    helper = helper_piece(name, "bounds", graph, (example, shape), ())
    outer.add_submodule(name, helper.module)
    rows = example.shape[0]
    with outer.graph.inserting_before(calls[0]):
        every = outer.graph.call_module(name, (bounds, table))
        every.meta[PIECE] = helper
        every.meta["example_value"] = example.new_empty((len(calls), rows, heads, 1, 5))
        each = [outer.graph.call_function(operator.getitem, (every, i)) for i in range(len(calls))]
    for call, piece, own in zip(calls, pieces, each, strict=True):
        own.meta["example_value"] = example.new_empty((rows, heads, 1, 5))
        at = _bounds_input(piece, attention_node(piece))
        call.args = (*call.args[:at], own, *call.args[at + 1 :])
        windowed = made.get(piece.key)
        if windowed is None:
            windowed = made[piece.key] = _with_bounds(piece, at, own.meta["example_value"])
        _call_instead(outer, call, replace(piece, module=windowed.module, key=windowed.key))


def _with_bounds(piece: Piece, at: int, example: torch.Tensor) -> Piece:
    """Return a piece for bounds of another shape."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(piece.module.graph, {}))
    bounds = graph.find_nodes(op="placeholder")[at]
    bounds.meta = {**bounds.meta, "example_value": example}
    module = Uncoded(piece.module, graph, "Piece")
    return replace(piece, module=module, key=structural_key(module))


# Either way --------------------------------------------------------------------------------------


def _call_instead(outer: fx.GraphModule, call: fx.Node, piece: Piece) -> None:
    outer.add_submodule(piece.name, piece.module)
    call.meta[PIECE] = piece


def _new_input(
    graph: fx.Graph, name: str, example: torch.Tensor, indices: tuple[int, ...]
) -> fx.Node:
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["example_value"] = example
    node.meta[WINDOWS] = indices
    return node
