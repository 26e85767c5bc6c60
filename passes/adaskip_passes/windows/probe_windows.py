"""The instrumentation pass: measure what a window would do to each K/V head alone.

Before::                                    After::

    x_1 = self.layers_0_attention(h, ...)       x_1 = self.layers_0_attention(h, ...)
    x_2 = self.layers_0_ffn(x_1, ...)           x_2 = self.layers_0_ffn(x_1, ...)
    ...                                         windowed_0 = self.windowed_0(h, ..., x_2, valid)
    return (logits,)                            ...
                                                return (logits, cat([windowed_0, ...]))

The piece that is added computes the attention of a sublayer again, and through each window. For
each K/V head it exchanges the outputs of the queries that read it, follows the code of the piece
from there on (the output projection, whatever else there is), and compares the stream after the
layer with what it would be if the branch's change were carried on to there. So nothing has to be
known of a model's modules. Legal because it only reads; a piece whose code writes where that
matters is refused.

Attention goes through a window by the operators of :mod:`.ops`, a block of queries at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..analysis.effects import AUTOCAST_ENDS, operation, written
from ..analysis.structural_key import structural_key
from ..analysis.symbolic_lengths import length_inputs
from ..errors import UnsupportedError
from ..infra.graph_module import Uncoded
from ..infra.pass_base import Pass, PassResult
from ..partition.outer import PIECE, Piece, piece_of, stream_after, sublayer_calls
from ..transforms.dead_code import eliminate_dead_code
from ..transforms.probe import append_output, valid_input
from .find_attention import BY_BOUNDS, attention_node, example_of
from .narrow_attention import attend_in_window, heads_dimension

#: What is measured, per row, summed over its valid tokens: 1 - cos(a, b) of the stream after the
#: layer, as it is and as a window would make it; its power of 3/2; and 1, so how many tokens count.
WINDOW_STATS = ("dissimilarity", "power", "tokens")


@dataclass(frozen=True)
class ProbeWindows(Pass):
    """Pass over an outer graph of a prompt: measure windows. Its changes are sublayers.

    Adds the input ``valid`` (see `Probe`) and, as last output, float32 [K/V heads, windows, batch,
    3] in the order of `sublayers` and their heads, of `windows` and of `WINDOW_STATS`. Run it
    before passes that change pieces.

    Attributes:
        sublayers: Positions along the stream of attention that runs; at least one.
        windows: Sinks and tokens of each window; at least one.
    """

    sublayers: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Insert the probes; see :class:`Pass`.

        Raises:
            UnsupportedError: A sublayer is not in the graph, or cannot be measured.
        """
        outer, calls = graph_module, sublayer_calls(graph_module.graph)
        missing = [i for i in self.sublayers if i not in calls]
        if missing:
            raise UnsupportedError(f"sublayers {missing} are not in the graph: nothing to measure")
        graph, readings = outer.graph, list[fx.Node]()
        first = calls[self.sublayers[0]].args[0]
        assert isinstance(first, fx.Node)
        valid = valid_input(graph, example_of(first))
        last = {_layer_of(call): call for _, call in sorted(calls.items())}
        for index in self.sublayers:
            call = calls[index]
            after = stream_after(last[_layer_of(call)])
            readings.append(self._insert(outer, call, after, valid))
        with graph.inserting_before(graph.output_node()):
            together = graph.call_function(torch.cat, (tuple(readings),))
        append_output(graph, together)
        return PassResult(outer, len(self.sublayers))

    def _insert(
        self, outer: fx.GraphModule, call: fx.Node, after: fx.Node, valid: fx.Node
    ) -> fx.Node:
        piece, name = piece_of(call), f"windowed_{_layer_of(call)}"
        assert piece is not None
        lengths = length_inputs(outer.graph, (*call.all_input_nodes, after, valid))
        given = (after, valid, *lengths)
        examples = [node.meta["example_value"] for node in given]
        module, taken = _measuring(piece, self.windows, examples)
        outer.add_submodule(name, module)
        arguments = (*(call.args[i] for i in taken), *given)
        with outer.graph.inserting_after(after):
            node = outer.graph.create_node("call_module", name, arguments, name=name)
        node.meta[PIECE] = Piece(name, "probe", module, structural_key(module))
        return node


def _layer_of(call: fx.Node) -> int:
    piece = piece_of(call)
    assert piece is not None
    return piece.layer


def _measuring(
    piece: Piece, windows: Sequence[tuple[int, int]], examples: Sequence[object]
) -> tuple[fx.GraphModule, list[int]]:
    """Return the code that measures a piece, and which of the piece's inputs it takes.

    Args:
        piece: The sublayer.
        windows: Sinks and tokens of each window.
        examples: Example values of what it takes besides: the stream after the layer, the mask of
            tokens that count, lengths.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    result = graph.graph_copy(piece.module.graph, copies)
    stream = result[0] if isinstance(result, tuple | list) else result
    attention, inputs = copies[attention_node(piece)], graph.find_nodes(op="placeholder")
    assert isinstance(stream, fx.Node)
    if attention.target in BY_BOUNDS:
        raise UnsupportedError("windows are measured in prompts, and this graph is a step's")
    with graph.inserting_after(inputs[-1]):
        more = [graph.placeholder(f"given_{i}") for i in reversed(range(len(examples)))][::-1]
    for node, example in zip(more, examples, strict=True):
        node.meta["example_value"] = example
    after, valid = more[:2]
    branch, tail = _branch(stream, attention)
    written_to = _written_to(piece, graph)
    heads = int(example_of(attention.args[1]).shape[1])
    readings = _readings(piece, attention, branch, tail, (after, valid), windows)
    stacked = graph.call_function(torch.stack, (tuple(readings),))
    graph.output(graph.call_method("unflatten", (stacked, 0, (heads, len(windows)))))
    eliminate_dead_code(graph, keep=lambda _: False)
    taken = [i for i, n in enumerate(inputs) if n.users]
    if any(inputs[i] in written_to for i in taken):
        raise _refused(piece, "it reads what it writes")
    for node in inputs:
        if not node.users:
            graph.erase_node(node)
    return Uncoded(piece.module, graph, "Piece"), taken


def _branch(stream: fx.Node, attention: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return what is added to the stream, and the code that makes it of attention, in order."""
    made = {attention}
    for node in attention.graph.nodes:
        if made.intersection(node.all_input_nodes):
            made.add(node)
    (branch,) = [n for n in stream.all_input_nodes if n in made]
    needed = {branch}
    for node in reversed(list(attention.graph.nodes)):
        if node in needed:
            needed.update(node.all_input_nodes)
    made.remove(attention)
    return branch, [n for n in attention.graph.nodes if n in made and n in needed]


def _readings(
    piece: Piece,
    attention: fx.Node,
    branch: fx.Node,
    tail: Sequence[fx.Node],
    given: tuple[fx.Node, fx.Node],
    windows: Sequence[tuple[int, int]],
) -> list[fx.Node]:
    """Add the measures [batch, 3], those of a head's windows side by side, to the graph."""
    graph, dimension = attention.graph, heads_dimension(attention)
    heads = int(example_of(attention.args[1]).shape[1])
    group = int(example_of(attention.args[0]).shape[1]) // heads
    through = []
    for window in windows:
        with graph.inserting_before(attention):
            table = graph.call_function(torch.tensor, ([list(window)] * heads,))
        through.append(attend_in_window(piece, attention, table))
    readings = []
    for head in range(heads):
        begin = head * group
        for (sinks, tokens), windowed in zip(windows, through, strict=True):
            theirs = graph.call_method("narrow", (windowed, dimension, begin, group))
            mixed = graph.call_function(
                torch.slice_scatter, (attention, theirs, dimension, begin, begin + group)
            )
            copies = {attention: mixed}
            for node in tail:
                copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))  # noqa: B023
            compared = (given[0], branch, copies[branch], given[1], sinks + tokens)
            readings.append(graph.call_function(dissimilarity, compared))
    return readings


def dissimilarity(
    after: torch.Tensor,
    branch: torch.Tensor,
    windowed: torch.Tensor,
    valid: torch.Tensor,
    seen: int,
) -> torch.Tensor:
    """Return the sums [batch, 3] of `WINDOW_STATS`.

    1 - cos is half the squared distance of unit vectors, which small changes do not cancel in. A
    token whose stream is of length zero or not finite counts for nothing.

    Args:
        after: The stream after the layer, [batch, tokens, hidden].
        branch: What the sublayer adds to it.
        windowed: What it would add.
        valid: Which tokens count, bool [batch, tokens].
        seen: How many first tokens of a row see no less through the window.
    """
    a = after.to(torch.float32)
    b = a + (windowed.to(torch.float32) - branch.to(torch.float32))
    a, b = (t / torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (a, b))
    change = (a - b).square().sum(-1) / 2
    counts = valid & torch.isfinite(change)
    index = torch.arange(valid.shape[1], device=valid.device)
    position = index - valid.to(torch.int32).argmax(-1, keepdim=True)
    change = torch.where(counts & (position >= seen), change, 0.0)
    sums = change, change.pow(1.5), counts.to(torch.float32)
    return torch.stack([each.sum(-1) for each in sums], -1)


def _written_to(piece: Piece, graph: fx.Graph) -> set[fx.Node]:
    """Return the inputs that code writes to, which is not to be run again.

    Raises:
        UnsupportedError: It writes to what it has computed, or casts in a region.
    """
    roots = {root for node in graph.nodes if (root := written(node)) is not None}
    if any(root.op != "placeholder" for root in roots):
        raise _refused(piece, "it changes values in place")
    if any(operation(node) in AUTOCAST_ENDS for node in graph.nodes):
        raise _refused(piece, "a part of it has an autocast of its own")
    return roots


def _refused(piece: Piece, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"layer {piece.layer}'s {piece.kind} cannot be measured through a window: {why}"
    )
