"""Inner pass for a decode step: convolutions and products of a few numbers are written out.

Before::                                            After::

    y = conv1d(x, w, bias, groups=channels)         y = x[..., 0:1] * w[:, :, 0] + ... + bias
    z = bmm(states, c)  # [B, P, N] @ [B, N, 1]     z = (states * c.transpose(1, 2)).sum(-1, True)

A mixer's step convolves each channel over the last few tokens, and reads its states by products of
a matrix with one vector. As calls of libraries these are kernels of microseconds, between which
what they read and give is written to memory. Written out, a compiler makes one kernel of them and
of what stands around them: a state is decayed, stored and read at once. Legal because the same
numbers are multiplied and added, in float32, and rounded once; their order may be another one, so
the pass preserves results to rounding.

A convolution is left alone if it mixes channels, has a stride, a dilation or padding, gives more
than `MOST_OUTPUTS` tokens or reads more than `MOST_TAPS` for each. A product is left alone if its
matrix is an input of the piece, for that is what libraries are good at, or has another dtype than
its vector. Only what has known sizes, but for its rows, in a
floating dtype of at most 32 bits.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..analysis.effects import storage_root
from ..infra.pass_base import Pass, PassResult
from ..transforms.dead_code import eliminate_dead_code
from .matching import calls, example, only_user

MOST_OUTPUTS = 4
MOST_TAPS = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EVERYTHING = slice(None)


@dataclass(frozen=True)
class WriteOutProducts(Pass):
    """Pass over the graph of a piece, whose nodes carry their example values.

    Its changes are convolutions and products that were written out, and erased nodes.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Write them out; see :class:`Pass`."""
        graph, changes = graph_module.graph, 0
        for node in list(graph.nodes):
            if calls(node, "conv1d") and (found := _taps(node)) is not None:
                _write_out_convolution(graph, node, *found)
            elif calls(node, "bmm", "matmul") and _is_matrix_by_vector(node):
                _write_out_product(graph, node)
            else:
                continue
            changes += 1
        erased = eliminate_dead_code(graph) if changes else 0
        return PassResult(graph_module, changes + erased)


def _taps(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return input, weight and bias of a convolution that may be written out."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    source, factors, bias = (given.get(name) for name in names[:3])
    x, weight = example(source), example(factors)
    if x is None or weight is None or x.dim() != 3 or not _alike(x, weight):
        return None
    plain = all(
        given.get(name, plain) in (plain, (plain,), [plain])
        for name, plain in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    channels, inner, taps = weight.shape
    if not plain or not _known(*weight.shape, *x.shape[1:]):
        return None
    if inner != 1 or x.shape[1] != channels or given.get("groups") != channels:
        return None
    if taps > MOST_TAPS or not 0 < x.shape[-1] - taps + 1 <= MOST_OUTPUTS:
        return None
    assert isinstance(source, fx.Node)
    assert isinstance(factors, fx.Node)
    return source, factors, bias if isinstance(bias, fx.Node) else None


def _write_out_convolution(
    graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> None:
    """Write a convolution out, of the outputs that are read."""
    taps = weight.meta["example_value"].shape[-1]
    outputs = node.meta["example_value"].shape[-1]
    first, results = 0, node
    if (last := only_user(node)) is not None and (read := _last_outputs(last)):
        first, results = max(0, outputs - read), last
    with graph.inserting_before(node):
        terms = []
        for tap in range(taps):
            tokens = slice(first + tap, outputs + tap)
            window = _wide(graph, x, (_EVERYTHING, _EVERYTHING, tokens))
            factor = _wide(graph, weight, (_EVERYTHING, _EVERYTHING, tap))
            terms.append(graph.call_function(operator.mul, (window, factor)))
        if bias is not None:
            terms.append(_wide(graph, bias, (_EVERYTHING, None)))
        total = functools.reduce(lambda a, b: graph.call_function(operator.add, (a, b)), terms)
        written = graph.call_method("to", (total, node.meta["example_value"].dtype))
    _replace(results, written)


def _wide(graph: fx.Graph, node: fx.Node, index: tuple[Any, ...]) -> fx.Node:
    """Return a part of a tensor in float32."""
    return graph.call_method("float", (graph.call_function(operator.getitem, (node, index)),))


def _last_outputs(node: fx.Node) -> int:
    """Return how many of the last tokens a slice takes; 0 if a node is something else."""
    index = node.args[1] if calls(node, "getitem") else None
    if not isinstance(index, tuple) or len(index) != 3 or index[:2] != (_EVERYTHING, _EVERYTHING):
        return 0
    start = index[2].start if isinstance(index[2], slice) else None
    if not isinstance(start, int) or start >= 0 or index[2] != slice(start, None, None):
        return 0
    return -start


def _is_matrix_by_vector(node: fx.Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    matrix, vector = (example(a) for a in node.args)
    if matrix is None or vector is None or matrix.dim() != vector.dim() or matrix.dim() < 3:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return (
        _alike(matrix, vector)
        and _known(*matrix.shape[-2:], vector.shape[-1])
        and vector.shape[-1] == 1
        and storage_root(source).op != "placeholder"
    )


def _write_out_product(graph: fx.Graph, node: fx.Node) -> None:
    matrix, vector = node.args
    with graph.inserting_before(node):
        turned = graph.call_method("transpose", (vector, -1, -2))
        wide = [graph.call_method("float", (part,)) for part in (matrix, turned)]
        product = graph.call_function(operator.mul, tuple(wide))
        total = graph.call_method("sum", (product, -1), {"keepdim": True})
        written = graph.call_method("to", (total, node.meta["example_value"].dtype))
    _replace(node, written)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, one of ours."""
    return one.dtype == other.dtype and one.dtype in _DTYPES


def _known(*sizes: int | torch.SymInt) -> bool:
    """Return whether sizes are the same at every call; the number of rows need not be."""
    return all(isinstance(size, int) for size in sizes)


def _replace(node: fx.Node, written: fx.Node) -> None:
    written.meta["example_value"] = node.meta.get("example_value")
    node.replace_all_uses_with(written)
