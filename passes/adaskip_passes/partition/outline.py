"""Cut a captured decoder into pieces, and write it again as a graph of calls to them.

Before (one flat graph)::                After (the outer graph, small enough to print)::

    h = embedding(ids, w)                    prologue = self.prologue(ids, w, ...)
    q = linear(norm(h), wq)                  h, cos, sin = prologue
    ...                                      x_1 = self.layers_0_attention(h, cos, sin, ...)
    h_1 = h + o                              x_2 = self.layers_0_ffn(x_1, ...)
    ...                                      logits = self.epilogue(x_2, ...)

Each piece takes first the residual stream, then values that the prologue shares out, then inputs
of the captured graph (its weights, its slots of the cache), and returns the new stream. Equal
pieces (same code, other weights) have equal keys and are compiled once.

Legal because nothing changes but the grouping: every node is computed from the same operands, and
reads and writes of mutated storage keep their order, which is checked.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from ..analysis.residual_branches import ResidualBranch
from ..analysis.structural_key import structural_key
from ..analysis.symbolic_lengths import length_inputs
from ..normalize.serialize_branches import ordered_after
from .placement import assign_partitions, in_place_adds

Role = Literal["prologue", "sublayer", "epilogue", "probe", "surrogate", "residue"]

PIECE = "adaskip_piece"
CAPTURED = "adaskip_captured"  # marks the captured graph's inputs among those that passes add


@dataclass(frozen=True)
class Piece:
    """One call target of an outer graph.

    Attributes:
        name: its name in the outer graph (``layers_0_attention``).
        role: what it is for.
        module: its graph: a GraphModule whose inputs are the stream, shared values, weights, cache.
        key: equal for pieces that are the same code over inputs of equal shape, dtype and device.
        index: position of the sublayer along the stream; -1 for other pieces.
        layer, kind: of the sublayer; -1 and "" for other pieces.
        outputs: how many values it returns; one means the value itself, not a tuple.
    """

    name: str
    role: Role
    module: fx.GraphModule = field(repr=False, compare=False)
    key: str = field(repr=False)
    index: int = -1
    layer: int = -1
    kind: str = ""
    outputs: int = 1


class Uncoded(fx.GraphModule):
    """A GraphModule whose code is not generated, because nothing runs it.

    A GraphModule generates code whenever its graph is set, which takes longer than rewriting the
    graph; :func:`link` makes its own program, and a piece is compiled from a copy.
    """

    def recompile(self) -> Any:
        """Nothing to do: see the class."""

    def forward(self, *args: Any) -> Any:
        """Run node by node, for debugging."""
        return fx.Interpreter(self).run(*args)


class Outer(Uncoded):
    """An outer graph: its calls carry their `Piece` in ``node.meta``."""


def outline(graph_module: fx.GraphModule, sublayers: Sequence[ResidualBranch]) -> Outer:
    """The outer graph of a captured graph.

    Args:
        graph_module: as captured; it is not changed.
        sublayers: what :func:`find_sublayers` found in it.

    Returns:
        A graph with the same placeholders, whose other nodes are calls to pieces (``node.meta``
        holds the :class:`Piece` under ``PIECE``) and the unpacking of their results.

    Raises:
        UnsupportedError: when cutting would reorder accesses to mutated storage.
    """
    placement = assign_partitions(graph_module.graph, sublayers)
    builder = _Builder(graph_module, placement, sublayers)
    return builder.build()


def piece_of(node: fx.Node) -> Piece | None:
    """The piece that a node of an outer graph calls, or None."""
    piece = node.meta.get(PIECE)
    return piece if isinstance(piece, Piece) else None


def helper_piece(
    name: str, role: Role, graph: fx.Graph, examples: Sequence[Any], lengths: Sequence[fx.Node]
) -> Piece:
    """A piece that a pass adds to an outer graph.

    Args:
        name, role: of the piece.
        graph: its code; changed: an input is added for each of `lengths`.
        examples: example (fake) values of its inputs.
        lengths: integer placeholders of the outer graph that its inputs' shapes depend on; they
            are handed over after the other inputs.
    """
    inputs = graph.find_nodes(op="placeholder")
    for node, example in zip(inputs, examples, strict=True):
        node.meta["example_value"] = example
    last = inputs[-1]
    for length in lengths:
        with graph.inserting_after(last):
            last = graph.placeholder(length.name)
        last.meta["example_value"] = length.meta["example_value"]
    module = fx.GraphModule(torch.nn.Module(), graph, name.capitalize())
    return Piece(name, role, module, structural_key(module))


def sublayer_calls(outer: fx.Graph) -> dict[int, fx.Node]:
    """The calls of sublayers that an outer graph still makes, by position along the stream."""
    calls = ((piece_of(n), n) for n in outer.nodes)
    return {p.index: n for p, n in calls if p is not None and p.role == "sublayer"}


def stream_after(call: fx.Node) -> fx.Node:
    """The stream that a call of a sublayer makes."""
    piece = piece_of(call)
    if piece is None or piece.outputs == 1:
        return call
    return next(user for user in call.users if user.args[1] == 0)


class _Builder:
    """Builds the outer graph, piece by piece in stream order."""

    def __init__(
        self,
        source: fx.GraphModule,
        place: Mapping[fx.Node, int],
        sublayers: Sequence[ResidualBranch],
    ) -> None:
        self.source = source
        self.place = place
        self.sublayers = sublayers
        self.outer = fx.Graph()
        self.root = torch.nn.Module()
        self.in_place = in_place_adds(source.graph, sublayers)
        self.value: dict[fx.Node, fx.Node] = {}  # captured node -> its value in the outer graph

    def build(self) -> Outer:
        for node in self.source.graph.find_nodes(op="placeholder"):
            self.value[node] = self.outer.node_copy(node)
            self.value[node].meta[CAPTURED] = True
        members: dict[int, list[fx.Node]] = {}
        for node, at in self.place.items():
            members.setdefault(at, []).append(node)
        for at in sorted(members):
            self._call(at, members[at])
        (result,) = self.source.graph.output_node().args
        self.outer.output(fx.map_arg(result, lambda n: self.value[n]))
        return Outer(self.root, self.outer, "Outer")

    def _call(self, at: int, nodes: list[fx.Node]) -> None:
        inputs, outputs = self._interface(at, nodes)
        module = _piece_module(self.source, nodes, inputs, outputs, self.in_place)
        piece = self._piece(at, module, len(outputs))
        self.root.add_module(piece.name, module)
        call = self.outer.create_node(
            "call_module",
            piece.name,
            tuple(self.value[i] for i in inputs),
            name=f"x_{piece.index + 1}" if piece.role == "sublayer" else piece.name,
        )
        call.meta[PIECE] = piece
        if len(outputs) == 1:
            self._name_value(outputs[0], call)
            return
        for i, output in enumerate(outputs):
            item = self.outer.create_node(
                "call_function", operator.getitem, (call, i), name=output.name
            )
            self._name_value(output, item)

    def _name_value(self, captured: fx.Node, value: fx.Node) -> None:
        self.value[captured] = value
        if "example_value" in captured.meta:
            value.meta["example_value"] = captured.meta["example_value"]

    def _interface(self, at: int, nodes: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """What a piece takes (stream, shared values, captured inputs) and what it gives."""
        own = set(nodes)
        taken: dict[fx.Node, None] = {}
        for node in nodes:
            taken.update(dict.fromkeys(i for i in node.all_input_nodes if i not in own))
        given = [n for n in nodes if any(u not in own for u in n.users)]
        stream = self._stream(at)
        ranked = sorted(taken, key=lambda n: (n is not stream, n.op == "placeholder"))
        ranked += length_inputs(self.source.graph, ranked)
        main = self.sublayers[at - 1].add if 0 < at <= len(self.sublayers) else stream
        return ranked, sorted(given, key=lambda n: n is not main)

    def _stream(self, at: int) -> fx.Node:
        """The stream that piece `at` reads; for the prologue, the one that it makes."""
        if at <= 1:
            return self.sublayers[0].stream
        return self.sublayers[at - 2].add

    def _piece(self, at: int, module: fx.GraphModule, outputs: int) -> Piece:
        key = structural_key(module)
        if at == 0:
            return Piece("prologue", "prologue", module, key, outputs=outputs)
        if at > len(self.sublayers):
            return Piece("epilogue", "epilogue", module, key, outputs=outputs)
        s = self.sublayers[at - 1]
        return Piece(s.name, "sublayer", module, key, s.index, s.layer, s.kind, outputs)


def _piece_module(
    source: fx.GraphModule,
    nodes: Iterable[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    in_place: Collection[fx.Node],
) -> fx.GraphModule:
    """The code of a piece; an add in `in_place` gets a result of its own (see `in_place_adds`)."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(_short_name(node))
        copies[node].target = copies[node].name  # the name was made unique
        copies[node].meta = dict(node.meta)
    for node in nodes:
        if node.target is ordered_after:
            copies[node] = copies[node.all_input_nodes[-1]]
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node in in_place:
            copies[node].op, copies[node].target = "call_function", operator.add
    results = tuple(copies[n] for n in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return Uncoded(source, graph, "Piece")


def _short_name(node: fx.Node) -> str:
    """``l_model_modules_layers_modules_3_modules_mlp_parameters_weight_`` -> ``mlp_weight``."""
    if node.op != "placeholder":
        return node.name
    parts = [p for p in re.split(r"_(?:modules|parameters|buffers)_", node.name) if p]
    return "_".join(parts[-2:]).strip("_") if len(parts) > 1 else node.name.strip("_")
