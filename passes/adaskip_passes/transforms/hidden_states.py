"""Return the hidden states of a decoder: the stream before each layer, and what its head reads.

Before::                                    After::

    x_1 = self.layers_0_attention(h, ...)       x_1 = self.layers_0_attention(h, ...)
    x_2 = self.layers_0_ffn(x_1, ...)           x_2 = self.layers_0_ffn(x_1, ...)
    x_3 = self.layers_1_attention(x_2, ...)     x_3 = self.layers_1_attention(x_2, ...)
    x_4 = self.layers_1_ffn(x_3, ...)           x_4 = self.layers_1_ffn(x_3, ...)
    logits = self.epilogue(x_4, ...)            logits = self.epilogue(x_4, ...)
                                                last = self.final_norm(x_4, norm_weight)
    return (logits,)                            return (logits, h, x_2, last)

The last piece is a copy of the epilogue up to its first matrix product: of all tokens, whichever
the logits are of. Legal because nothing else changes. Run it first: what a later pass puts in
place of a sublayer is then among the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..analysis.effects import operation
from ..analysis.structural_key import structural_key
from ..errors import UnsupportedError
from ..infra.graph_module import copied
from ..infra.pass_base import Pass, PassResult
from ..partition.outer import PIECE, Piece, piece_of, stream_after, sublayer_calls
from .dead_code import eliminate_dead_code

_NAME = "final_norm"
_PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"})


@dataclass(frozen=True)
class HiddenStates(Pass):
    """Pass over an outer graph: return hidden states, one more than there are layers.

    They are the last outputs, each [batch, tokens, hidden]. Its changes are hidden states.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Append the outputs; see :class:`Pass`.

        Raises:
            UnsupportedError: The graph ends in no piece that makes logits of the stream.
        """
        outer = graph_module
        calls = [call for _, call in sorted(sublayer_calls(outer.graph).items())]
        first: dict[int, fx.Node] = {}
        for call in calls:
            piece = piece_of(call)
            assert piece is not None
            first.setdefault(piece.layer, call)
        states = [call.args[0] for call in first.values()]
        states.append(_final_state(outer, stream_after(calls[-1])))
        output = outer.graph.output_node()
        (results,) = output.args
        assert isinstance(results, tuple | list)
        output.args = ((*results, *states),)
        return PassResult(outer, len(states))


def _final_state(outer: fx.GraphModule, stream: fx.Node) -> fx.Node:
    """Return what the head reads of the last stream, of all tokens, by a piece of its own."""
    for call in outer.graph.find_nodes(op="call_module"):
        piece = piece_of(call)
        if piece is not None and piece.role == "epilogue":
            break
    else:
        raise UnsupportedError("the graph has no epilogue, so that it has no hidden states")
    if stream not in call.args:
        raise UnsupportedError("the epilogue does not read the residual stream")
    inputs = piece.module.graph.find_nodes(op="placeholder")
    wanted = _before_product(piece.module.graph, inputs[call.args.index(stream)])
    if wanted.op == "placeholder":
        return stream
    return piece_until(outer, call, wanted, _NAME)


def piece_until(outer: fx.GraphModule, call: fx.Node, value: fx.Node, name: str) -> fx.Node:
    """Return a call, put before `call`, of the code of its piece up to `value`.

    Args:
        outer: The graph of pieces.
        call: Of a piece.
        value: What is wanted, in the piece.
        name: Of the piece that is added.

    """
    piece = piece_of(call)
    assert piece is not None
    inputs = piece.module.graph.find_nodes(op="placeholder")
    module = until(piece.module, value.name)
    read = {n.name for n in module.graph.find_nodes(op="placeholder")}
    taken = [a for a, n in zip(call.args, inputs, strict=True) if n.name in read]
    outer.add_submodule(name, module)
    with outer.graph.inserting_before(call):
        node = outer.graph.create_node("call_module", name, tuple(taken), name=name)
    node.meta[PIECE] = Piece(name, "epilogue", module, structural_key(module))
    node.meta["example_value"] = value.meta["example_value"]
    return node


def until(whole: fx.GraphModule, name: str) -> fx.GraphModule:
    """Return the code of a piece up to a node, with the tensors that it reads and all lengths."""
    module = copied(whole)
    last = next(n for n in module.graph.nodes if n.name == name)
    module.graph.output_node().args = (last,)
    eliminate_dead_code(module.graph)
    for node in module.graph.find_nodes(op="placeholder"):
        if not node.users and isinstance(node.meta.get("example_value"), torch.Tensor):
            module.graph.erase_node(node)
    return module


def _before_product(graph: fx.Graph, stream: fx.Node) -> fx.Node:
    """Return the last value like the stream that is made of it before the first product."""
    shape, last, made = _shape(stream), stream, {stream}
    for node in graph.nodes:
        if not made.intersection(node.all_input_nodes):
            continue
        if operation(node) in _PRODUCTS:
            break
        made.add(node)
        if _shape(node) == shape:
            last = node
    return last


def _shape(node: fx.Node) -> tuple[Any, ...] | None:
    """Return shape and dtype of a value, lengths by name (to compare symbols is to guard them)."""
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor):
        return None
    return (*map(str, example.shape), example.dtype)
