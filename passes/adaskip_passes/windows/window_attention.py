"""The rewrite: attention that runs sees a window, by K/V head.

Before::                                    After (a prompt)::

    x_1 = self.layers_0_attention(h, ...)       x_1 = self.layers_0_attention(h, ..., windows_0)

                                            After (a step on a static cache)::

                                                narrowed = self.bounds(bounds, windows)
                                                x_1 = self.layers_0_attention(h, narrowed[0], ...)

Like `Skip` this changes the result: it computes the function of an eager model whose mask in that
layer lets fewer keys through. What is stored is not its business. The window is data: its sinks and
tokens are inputs of the outer graph, int64 [H_kv, 2] on the CPU for a prompt, and [layers, H_kv, 2]
on the device where attention reads a table of bounds. So any choice of layers, heads and windows
calls one piece more than the captured graph has, however many plans there are.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..analysis.structural_key import structural_key
from ..errors import UnsupportedError
from ..infra.graph_module import Uncoded
from ..infra.pass_base import Pass, PassResult
from ..partition.outer import PIECE, Piece, helper_piece, piece_of, sublayer_calls
from .bounds import narrowed
from .find_attention import BY_BOUNDS, attention_node, example_of
from .narrow_attention import attend_in_window

WINDOWS = "adaskip_windows"  # marks an input: the positions of the sublayers whose windows it holds

_MARK = "adaskip_windowed"  # marks a call whose attention sees a window


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
        found, narrower = _Attentions(), dict[str, Piece]()
        by_bounds: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        for index in self.sublayers:
            if index not in calls:
                raise UnsupportedError(f"sublayer {index} is not in the graph: it sees nothing")
            call = calls[index]
            piece, node = found.of(call)
            if node.target not in BY_BOUNDS or found.place(call) is None:
                _narrow_in_piece(outer, call, piece, node, narrower)
            else:
                by_bounds.setdefault(found.reads(call), []).append(call)
        for (bounds, heads), windowed in by_bounds.items():
            # of all attention that reads these bounds, so that the table has one shape
            every = [c for c in calls.values() if found.may_read(c, bounds, heads)]
            _narrow_bounds(outer, bounds, heads, every, windowed, found, narrower)
        return PassResult(outer, len(self.sublayers))


class _Attentions:
    """The attention of pieces, looked for once in those of one key."""

    def __init__(self) -> None:
        # which input the bounds are (none where the piece makes them), K/V heads
        self._places: dict[str, tuple[int, int] | None] = {}

    def of(self, call: fx.Node) -> tuple[Piece, fx.Node]:
        """Return the piece that is called, and the node in it that is its attention."""
        piece = piece_of(call)
        assert piece is not None
        return piece, attention_node(piece)

    def reads(self, call: fx.Node) -> tuple[fx.Node, int]:
        """Return the table of bounds that a call hands to attention, and its K/V heads."""
        place = self.place(call)
        assert place is not None
        at, heads = place
        bounds = call.args[at]
        assert isinstance(bounds, fx.Node)
        return bounds, heads

    def place(self, call: fx.Node) -> tuple[int, int] | None:
        """Return which input of the piece is the table, and the K/V heads of its attention.

        None where the piece makes the table, since no other reads it.
        """
        piece = piece_of(call)
        assert piece is not None
        if piece.key not in self._places:
            node, known = attention_node(piece), None
            inputs = piece.module.graph.find_nodes(op="placeholder")
            if node.args[3] in inputs:
                known = inputs.index(node.args[3]), int(example_of(node.args[1]).shape[1])
            self._places[piece.key] = known
        return self._places[piece.key]

    def may_read(self, call: fx.Node, bounds: fx.Node, heads: int) -> bool:
        """Return whether a call's attention reads a table of bounds, for so many K/V heads."""
        if bounds not in call.args:
            return False
        try:
            return self.place(call) is not None and self.reads(call) == (bounds, heads)
        except UnsupportedError:
            return False


def window_inputs(outer: fx.Graph) -> dict[str, tuple[int, ...]]:
    """Return the inputs that hold windows: by name the positions of their sublayers."""
    marked = ((n.name, n.meta.get(WINDOWS)) for n in outer.find_nodes(op="placeholder"))
    return {name: mark for name, mark in marked if mark is not None}


def windowed_calls(outer: fx.Graph) -> frozenset[int]:
    """Return the positions of the sublayers that a graph calls whose attention sees a window."""
    calls = sublayer_calls(outer).items()
    return frozenset(index for index, call in calls if call.meta.get(_MARK))


# In prompts --------------------------------------------------------------------------------------


def _narrow_in_piece(
    outer: fx.GraphModule, call: fx.Node, piece: Piece, node: fx.Node, narrower: dict[str, Piece]
) -> None:
    """Have a piece take its window as one more input."""
    heads, query = example_of(node.args[1]).shape[1], example_of(node.args[0])
    if node.target in BY_BOUNDS:  # which reads a table on the device
        example = query.new_empty((1, heads, 2), dtype=torch.int64)
    else:
        example = query.new_empty((heads, 2), dtype=torch.int64, device="cpu")
    windowed = narrower.get(piece.key)
    if windowed is None:
        windowed = narrower[piece.key] = _with_window(piece, node, example)
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
    result = attend_in_window(piece, node, windows)
    if "example_value" in node.meta:
        result.meta["example_value"] = node.meta["example_value"]
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    module = Uncoded(piece.module, graph, "Piece")
    return replace(piece, module=module, key=structural_key(module))


# On a static cache -------------------------------------------------------------------------------


def _narrow_bounds(
    outer: fx.GraphModule,
    bounds: fx.Node,
    heads: int,
    every: Sequence[fx.Node],
    windowed: Sequence[fx.Node],
    found: _Attentions,
    narrower: dict[str, Piece],
) -> None:
    """Give each of the calls `windowed` bounds of its own, computed together before them."""
    indices = tuple(piece.index for call in every if (piece := piece_of(call)) is not None)
    example = example_of(bounds)
    tables = example.new_empty((len(every), heads, 2))
    table = _new_input(outer.graph, f"windows_{indices[0]}", tables, indices)
    graph, name = fx.Graph(), f"bounds_{indices[0]}"
    graph.output(
        graph.call_function(narrowed, (graph.placeholder("bounds"), graph.placeholder("tables")))
    )
    helper = helper_piece(name, "bounds", graph, (example, tables), ())
    outer.add_submodule(name, helper.module)
    own = example.new_empty((example.shape[0], heads, 1, 5))
    with outer.graph.inserting_before(every[0]):
        together = outer.graph.call_module(name, (bounds, table))
        together.meta[PIECE] = helper
        together.meta["example_value"] = example.new_empty((len(every), *own.shape))
    for number, call in enumerate(every):
        if call not in windowed:
            continue
        with outer.graph.inserting_before(every[0]):
            mine = outer.graph.call_function(operator.getitem, (together, number))
        mine.meta["example_value"] = own
        place, piece = found.place(call), piece_of(call)
        assert place is not None
        assert piece is not None
        at = place[0]
        call.args = (*call.args[:at], mine, *call.args[at + 1 :])
        new = narrower.get(piece.key)
        if new is None:
            new = narrower[piece.key] = _with_bounds(piece, at, own)
        _call_instead(outer, call, replace(piece, module=new.module, key=new.key))


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
    call.meta[_MARK] = True


def _new_input(
    graph: fx.Graph, name: str, example: torch.Tensor, indices: tuple[int, ...]
) -> fx.Node:
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["example_value"] = example
    node.meta[WINDOWS] = indices
    return node
