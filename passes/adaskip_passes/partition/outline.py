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

``torch.fx.passes.split_module`` cuts a graph by such a placement, too, and since torch 2.13 (2.11
does not have it) ``split_module_simple`` does without generating code. Here neither would do alone:
a piece's inputs come in the order of their first use, not with the stream first; the symbols in
their shapes are passed only where an operation names them; and an add in place stays one. The
simple one besides takes no autocast regions and no attributes.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import fx

from ..analysis.residual_branches import ResidualBranch
from ..analysis.structural_key import structural_key
from ..analysis.symbolic_lengths import length_inputs
from ..infra.graph_module import Uncoded, text
from ..infra.logs import logger_of
from ..normalize.serialize_branches import ordered_after
from .outer import CAPTURED, PIECE, Outer, Piece, piece_of
from .placement import assign_partitions, in_place_adds

_LOG = logger_of(__name__)


def outline(graph_module: fx.GraphModule, sublayers: Sequence[ResidualBranch]) -> Outer:
    """Return the outer graph of a captured graph.

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
    outer = _Builder(graph_module, placement, sublayers).build()
    if _LOG.isEnabledFor(logging.INFO):
        pieces = [piece for n in outer.graph.nodes if (piece := piece_of(n)) is not None]
        distinct = len({piece.key for piece in pieces})
        _LOG.info("outlined %d pieces, %d of them distinct", len(pieces), distinct)
    if _LOG.isEnabledFor(logging.DEBUG):
        _LOG.debug("outer graph:\n%s", text(outer))
    return outer


class _Builder:
    """The construction of an outer graph, piece by piece in stream order."""

    def __init__(
        self,
        source: fx.GraphModule,
        partition: Mapping[fx.Node, int],
        sublayers: Sequence[ResidualBranch],
    ) -> None:
        self.source = source
        self.partition = partition
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
        for node, at in self.partition.items():
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
        """Return what a piece takes (stream, shared values, captured inputs) and what it gives."""
        members = set(nodes)
        taken: dict[fx.Node, None] = {}
        for node in nodes:
            taken.update(dict.fromkeys(i for i in node.all_input_nodes if i not in members))
        outputs = [n for n in nodes if any(u not in members for u in n.users)]
        stream = self._stream(at)
        ranked = sorted(taken, key=lambda n: (n is not stream, n.op == "placeholder"))
        ranked += length_inputs(self.source.graph, ranked)
        main = self.sublayers[at - 1].add if 0 < at <= len(self.sublayers) else stream
        return ranked, sorted(outputs, key=lambda n: n is not main)

    def _stream(self, at: int) -> fx.Node:
        """Return the stream that piece `at` reads; for the prologue, the one that it makes."""
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
    """Return the code of a piece; an add in `in_place` gets a result of its own."""
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
    """Shorten ``l_layers_modules_3_modules_mlp_parameters_weight_`` to ``mlp_weight``."""
    if node.op != "placeholder":
        return node.name
    parts = [p for p in re.split(r"_(?:modules|parameters|buffers)_", node.name) if p]
    return "_".join(parts[-2:]).strip("_") if len(parts) > 1 else node.name.strip("_")
