"""The instrumentation pass: measure what sublayers do to the residual stream.

Before::                                    After probing sublayer 0::

    x_1 = self.layers_0_attention(h, ...)       x_1 = self.layers_0_attention(h, ...)
    ...                                         probe_0 = self.probe(h, x_1, valid)
    return (logits,)                            ...
                                                return (logits, stack([probe_0]))

A probe is a piece of its own that reads the stream before and after in float32, so a sublayer's
code never depends on whether it is probed and no output changes. (Computed inside Inductor's fused
bfloat16 pieces the values were off by 5e-5.) Legal because a probe only reads.

A token whose stream is of length zero or not finite, before or after the sublayer, has no direction
and no ratio. It is left out of all sums, and of the number of tokens, so a caller who knows how
many tokens were valid knows how many were left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..analysis.symbolic_lengths import length_inputs
from ..errors import UnsupportedError
from ..infra.pass_base import Pass, PassResult
from ..partition.outer import PIECE, Piece, helper_piece, piece_of, stream_after, sublayer_calls

#: What a probe measures, per row, summed over its valid tokens (a: stream before, b: after); the
#: last is how many of them count.
PROBE_STATS = ("cosine", "ratio", "before_squared", "after_squared", "tokens")

VALID = "valid"
_PROBED = "sublayers are probed"  # in the metadata of that input


@dataclass(frozen=True)
class Probe(Pass):
    """Pass over an outer graph: measure sublayers. Its changes are probed sublayers.

    Adds an input ``valid`` (bool [batch, tokens]: which tokens count) and, as last output,
    the moments, float32 [probed sublayers, batch, 5] in the order of `sublayers` and `PROBE_STATS`.

    Attributes:
        sublayers: positions along the stream; they must still be called by the graph.
        together: measure all of them at the end, in a few kernels for all instead of a piece for
            each. For a step of one token, whose streams are small and whose kernels are short.
    """

    sublayers: tuple[int, ...]
    together: bool = False

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Insert the probes; see :class:`Pass`.

        Raises:
            UnsupportedError: A sublayer does not run in this graph, or it is probed already.
        """
        if self.sublayers:
            self._insert(graph_module)
        return PassResult(graph_module, len(self.sublayers))

    def _insert(self, outer: fx.GraphModule) -> None:
        graph, calls = outer.graph, sublayer_calls(outer.graph)
        missing = [i for i in self.sublayers if i not in calls]
        if missing:
            raise UnsupportedError(
                f"sublayers {missing} do not run in this graph: nothing to measure"
            )
        first = calls[self.sublayers[0]].args[0]
        assert isinstance(first, fx.Node)
        valid = valid_input(graph, first.meta["example_value"])
        if valid.meta.get(_PROBED):
            raise UnsupportedError("this graph is probed already; name all sublayers in one Probe")
        valid.meta[_PROBED] = True
        pairs = [(calls[i].args[0], stream_after(calls[i])) for i in self.sublayers]
        if self.together:
            with graph.inserting_before(graph.output_node()):
                befores, afters = zip(*pairs, strict=True)
                node = graph.call_function(measure_together, (befores, afters, valid))
            append_output(graph, node)
            return
        _insert_probes(outer, pairs, valid, [f"probe_{i}" for i in self.sublayers])


@dataclass(frozen=True)
class ProbeLayers(Pass):
    """Pass over an outer graph: measure the stream before each layer and after it.

    Its changes are layers.

    Adds the moments, float32 [layers, batch, 5] in the order of layers and `PROBE_STATS`, as last
    output, and the input ``valid``. Run it before `Probe`, if that is to run as well, on a graph
    whose sublayers all run.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Insert the probes; see :class:`Pass`."""
        outer = graph_module
        layers: dict[int, list[fx.Node]] = {}
        for _, call in sorted(sublayer_calls(outer.graph).items()):
            piece = piece_of(call)
            assert piece is not None
            layers.setdefault(piece.layer, []).append(call)
        pairs = [(calls[0].args[0], stream_after(calls[-1])) for calls in layers.values()]
        first = pairs[0][0]
        assert isinstance(first, fx.Node)
        valid = valid_input(outer.graph, first.meta["example_value"])
        _insert_probes(outer, pairs, valid, [f"probe_layer_{n}" for n in layers])
        return PassResult(outer, len(layers))


def _insert_probes(
    outer: fx.GraphModule,
    pairs: Sequence[tuple[Any, fx.Node]],
    valid: fx.Node,
    names: Sequence[str],
) -> None:
    """Measure pairs of the stream before and after, by one piece; stacked as last output."""
    graph, first = outer.graph, pairs[0][0]
    lengths = length_inputs(graph, (first, valid))
    piece = probe_piece(first.meta["example_value"], valid.meta["example_value"], lengths)
    outer.add_submodule(piece.name, piece.module)
    readings = []
    for name, (before, after) in zip(names, pairs, strict=True):
        with graph.inserting_after(after):
            arguments = (before, after, valid, *lengths)
            reading = graph.create_node("call_module", piece.name, arguments, name=name)
        reading.meta[PIECE] = piece
        readings.append(reading)
    with graph.inserting_before(graph.output_node()):
        stacked = graph.call_function(torch.stack, (tuple(readings),))
    append_output(graph, stacked)


def probe_piece(stream: torch.Tensor, valid: torch.Tensor, lengths: Sequence[fx.Node]) -> Piece:
    """Return the piece that measures, for a stream and a mask like these (fake) examples."""
    graph = fx.symbolic_trace(_Measure()).graph
    return helper_piece("probe", "probe", graph, (stream, stream, valid), lengths)


class _Measure(torch.nn.Module):
    def forward(
        self, before: torch.Tensor, after: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Return statistics [batch, 5] in float32 of the streams [batch, tokens, hidden]."""
        return _measure(before, after, valid)


def measure_together(
    befores: Sequence[torch.Tensor], afters: Sequence[torch.Tensor], valid: torch.Tensor
) -> torch.Tensor:
    """Return statistics [probed, batch, 5] of several sublayers' streams [batch, tokens, hidden].

    The same values as from the piece, in as few kernels as torch has for them.
    """
    a, b = torch.stack(tuple(befores)), torch.stack(tuple(afters))
    norms = torch.linalg.vector_norm(torch.stack((a, b)), dim=-1, dtype=torch.float32)
    before, after = norms
    dots = torch.mul(a.float(), b).sum(-1)
    per_token = torch.stack(
        (dots / before / after, after / before, *norms.square(), torch.ones_like(dots)), -1
    )
    return _summed(per_token, valid)


def _measure(before: torch.Tensor, after: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    a, b = before.to(torch.float32), after.to(torch.float32)
    aa, bb, ab = (a * a).sum(-1), (b * b).sum(-1), (a * b).sum(-1)
    before, after = aa.sqrt(), bb.sqrt()
    per_token = torch.stack(
        (ab / (before * after), after / before, aa, bb, torch.ones_like(aa)), -1
    )
    return _summed(per_token, valid)


def _summed(per_token: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens that count: [..., batch, tokens, 5] becomes [..., batch, 5].

    Nothing guards the divisions: a stream of length zero gives NaN or Inf, as one that is not
    finite does, and such a token does not count.

    """
    counts = valid & (per_token.abs().amax(-1) < math.inf)  # false for NaN as well
    # where, not a product: what does not count may hold anything, NaN included
    return torch.where(counts.unsqueeze(-1), per_token, 0.0).sum(-2)


def valid_input(graph: fx.Graph, stream: torch.Tensor) -> fx.Node:
    """Return the input that says which tokens count, bool [batch, tokens], added if need be."""
    last: fx.Node
    for last in graph.find_nodes(op="placeholder"):
        if last.name == VALID:
            return last
    with graph.inserting_after(last):
        node = graph.placeholder(VALID)
    node.meta["example_value"] = stream.new_empty(stream.shape[:2], dtype=torch.bool)
    return node


def append_output(graph: fx.Graph, value: fx.Node) -> None:
    """Return one value more, as the last."""
    output = graph.output_node()
    (results,) = output.args
    assert isinstance(results, tuple | list)
    output.args = ((*results, value),)
