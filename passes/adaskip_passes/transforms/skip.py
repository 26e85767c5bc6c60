"""The rewrite: leave sublayers out of an outer graph.

Before::                                        After skipping layer 0's attention::

    x_1 = self.layers_0_attention(h, cos, ...)      scale_0 = self.scale(h, factor_0)
    x_2 = self.layers_0_ffn(x_1, ...)               x_2 = self.layers_0_ffn(scale_0, ...)

Unlike an optimisation this changes the result: it computes another function, the one that an
eager model computes whose sublayer ``x + f(x)`` is replaced by its surrogate. What it must not
change is everything else: effects that other code relies on stay (see `Keep`), and a sublayer
whose other values are read elsewhere is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from ..analysis.structural_key import structural_key
from ..analysis.symbolic_lengths import length_inputs
from ..errors import UnsupportedError
from ..infra.pass_base import Pass, PassResult
from ..partition.outer import PIECE, Piece, piece_of, sublayer_calls
from .dead_code import eliminate_dead_code
from .residue import Keep, residue
from .surrogates import SURROGATE, piece_name, surrogate_examples, surrogate_piece


@dataclass(frozen=True)
class Replacement:
    """What takes the place of one sublayer.

    Attributes:
        keep: Which of the sublayer's effects stay. ``counters``: those that do not depend on the
            stream (a cache's length), so that K/V writes go; ``everything``: K/V writes as well;
            ``nothing``: none, for a cache that has no storage for this sublayer.
        surrogate: A kind in `SURROGATES`, or None to leave the stream unchanged.
        rank: Of a ``"low_rank"`` surrogate.

    """

    keep: Keep = "counters"
    surrogate: str | None = None
    rank: int = 0


@dataclass(frozen=True)
class Skip(Pass):
    """Pass over an outer graph: replace sublayers. Its changes are replaced sublayers.

    Attributes:
        replacements: By position along the stream.
    """

    replacements: Mapping[int, Replacement] = field(default_factory=dict)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Replace the sublayers; see :class:`Pass`.

        Raises:
            UnsupportedError: A sublayer is not in the graph, or something besides the stream leaves
                it.
        """
        outer = graph_module
        calls = sublayer_calls(outer.graph)
        for index, replacement in sorted(self.replacements.items()):
            if index not in calls:
                raise UnsupportedError(
                    f"sublayer {index} is not in the graph: it has {sorted(calls) or 'none'}"
                )
            _replace(outer, calls[index], replacement)
        if self.replacements:  # an empty plan leaves the captured graph, unused inputs and all
            eliminate_dead_code(outer.graph, keep=_is_call, placeholders=True)
        return PassResult(outer, len(self.replacements))


def surrogate_inputs(outer: fx.Graph) -> dict[str, tuple[int, str]]:
    """Return the inputs that were added for surrogates: by name the position and the tensor."""
    marked = ((n.name, n.meta.get(SURROGATE)) for n in outer.find_nodes(op="placeholder"))
    return {name: mark for name, mark in marked if mark is not None}


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_module"


def _replace(outer: fx.GraphModule, call: fx.Node, replacement: Replacement) -> None:
    piece = piece_of(call)
    assert piece is not None
    if piece.outputs != 1:
        raise UnsupportedError(
            f"layer {piece.layer}'s {piece.kind} hands {piece.outputs - 1} value(s) besides the "
            "residual stream to later layers, so it cannot be skipped."
        )
    if any((p := piece_of(u)) and p.role == "probe" and u.args[1] is call for u in call.users):
        raise UnsupportedError(
            f"layer {piece.layer}'s {piece.kind} is probed: skip first, then probe what still runs"
        )
    stream = call.args[0]
    assert isinstance(stream, fx.Node)
    with outer.graph.inserting_before(call):
        if replacement.keep != "nothing":
            _insert_residue(outer, call, piece, replacement.keep)
        value = stream
        if replacement.surrogate is not None:
            value = _insert_surrogate(outer, stream, piece.index, replacement)
    call.replace_all_uses_with(value)
    outer.graph.erase_node(call)


def _insert_residue(outer: fx.GraphModule, call: fx.Node, piece: Piece, keep: Keep) -> None:
    module = residue(piece.module, keep)
    if module is None:
        return
    taken = [a for a, kept in zip(call.args, _used(piece.module, module), strict=True) if kept]
    name = f"{piece.name}_residue"
    outer.add_submodule(name, module)
    node = outer.graph.call_module(name, tuple(taken))
    node.meta[PIECE] = Piece(
        name, "residue", module, structural_key(module), piece.index, piece.layer, piece.kind, 0
    )


def _used(whole: fx.GraphModule, part: fx.GraphModule) -> list[bool]:
    names = {n.name for n in part.graph.find_nodes(op="placeholder")}
    return [n.name in names for n in whole.graph.find_nodes(op="placeholder")]


def _insert_surrogate(
    outer: fx.GraphModule, stream: fx.Node, index: int, replacement: Replacement
) -> fx.Node:
    kind, rank = replacement.surrogate, replacement.rank
    assert kind is not None
    example = stream.meta["example_value"]
    lengths = length_inputs(outer.graph, (stream,))
    inputs = []
    for name, tensor in surrogate_examples(kind, rank, example).items():
        inputs.append(_new_input(outer.graph, f"{name}_{index}", tensor))
        inputs[-1].meta[SURROGATE] = (index, name)
    piece = _shared_surrogate(outer, kind, rank, example, lengths)
    node = outer.graph.create_node(
        "call_module", piece.name, (stream, *inputs, *lengths), name=f"{kind}_{index}"
    )
    node.meta[PIECE] = piece
    node.meta["example_value"] = example
    return node


def _shared_surrogate(
    outer: fx.GraphModule, kind: str, rank: int, stream: torch.Tensor, lengths: list[fx.Node]
) -> Piece:
    """Return the outer graph's one piece for this kind of surrogate, added if need be."""
    name = piece_name(kind, rank)
    for node in outer.graph.nodes:
        piece = piece_of(node)
        if piece is not None and piece.role == "surrogate" and piece.name == name:
            return piece
    piece = surrogate_piece(kind, rank, stream, lengths)
    outer.add_submodule(piece.name, piece.module)
    return piece


def _new_input(graph: fx.Graph, name: str, example: torch.Tensor) -> fx.Node:
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["example_value"] = example
    return node
