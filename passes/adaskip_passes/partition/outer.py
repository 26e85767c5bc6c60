"""The outer graph: a small graph of calls to pieces, and what passes need to know of it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from ..analysis.structural_key import structural_key
from ..infra.graph_module import Uncoded

Role = Literal["prologue", "sublayer", "epilogue", "probe", "surrogate", "residue", "bounds"]

PIECE = "adaskip_piece"
CAPTURED = "adaskip_captured"  # marks the captured graph's inputs among those that passes add


@dataclass(frozen=True)
class Piece:
    """A call target of an outer graph.

    Attributes:
        name: Its name in the outer graph (``layers_0_attention``).
        role: What it is for.
        module: Its graph: a GraphModule whose inputs are the stream, shared values, weights, cache.
        key: Equal for pieces that are the same code over inputs of equal shape, dtype and device.
        index: Position of the sublayer along the stream; -1 for other pieces.
        layer: The decoder layer of the sublayer; -1 for other pieces.
        kind: Of the sublayer; "" for other pieces.
        outputs: How many values it returns; one means the value itself, not a tuple.

    """

    name: str
    role: Role
    module: fx.GraphModule = field(repr=False, compare=False)
    key: str = field(repr=False)
    index: int = -1
    layer: int = -1
    kind: str = ""
    outputs: int = 1


class Outer(Uncoded):
    """An outer graph: its calls carry their `Piece` in ``node.meta``."""

    def copied(self) -> Outer:
        """Return a graph that can be changed without this one; the pieces are shared."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return Outer(self, graph, "Outer")

    def check(self) -> None:
        """Check that the graph is well-formed and calls nothing but pieces.

        Raises:
            RuntimeError: It is not, or does.
        """
        super().check()
        for node in self.graph.find_nodes(op="call_module"):
            if piece_of(node) is None:
                raise RuntimeError(f"{node.name} calls {node.target}, which is not a piece")

    def text(self) -> str:
        """Return one line for each call; weights, cache slots and lengths are left out."""
        lines = []
        for node in self.graph.nodes:
            if node.op == "call_module" or (node.op == "call_function" and not _unpacks(node)):
                piece = piece_of(node)
                name = piece.name if piece else getattr(node.target, "__name__", str(node.target))
                lines.append(f"{_results(node)} = {name}({_arguments(node)})")
        lines.append(f"return {self.graph.output_node().args[0]}")
        return "\n".join(lines)


def piece_of(node: fx.Node) -> Piece | None:
    """Return the piece that a node of an outer graph calls, or None."""
    piece = node.meta.get(PIECE)
    return piece if isinstance(piece, Piece) else None


def helper_piece(
    name: str, role: Role, graph: fx.Graph, examples: Sequence[Any], lengths: Sequence[fx.Node]
) -> Piece:
    """Return a piece that a pass adds to an outer graph.

    Args:
        name: Of the piece.
        role: Of the piece.
        graph: Its code; changed: an input is added for each of `lengths`.
        examples: Example (fake) values of its inputs.
        lengths: Integer placeholders of the outer graph that its inputs' shapes depend on; they
            come after the other inputs.

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
    """Return the calls of sublayers that an outer graph makes, by position along the stream."""
    calls = ((piece_of(n), n) for n in outer.nodes)
    return {p.index: n for p, n in calls if p is not None and p.role == "sublayer"}


def stream_after(call: fx.Node) -> fx.Node:
    """Return the stream that a call of a sublayer makes."""
    piece = piece_of(call)
    if piece is None or piece.outputs == 1:
        return call
    return next(user for user in call.users if user.args[1] == 0)


def _unpacks(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _results(node: fx.Node) -> str:
    """Return the name of a call's value, or those of its values if it is unpacked."""
    items = sorted((u for u in node.users if _unpacks(u)), key=_place)
    return ", ".join(u.name for u in items) or node.name


def _place(item: fx.Node) -> int:
    position = item.args[1]
    assert isinstance(position, int)
    return position


def _arguments(node: fx.Node) -> str:
    shown = [str(a) for a in node.args if not (isinstance(a, fx.Node) and a.meta.get(CAPTURED))]
    hidden = len(node.args) - len(shown)
    return ", ".join([*shown, f"+{hidden} inputs"] if hidden else shown)
