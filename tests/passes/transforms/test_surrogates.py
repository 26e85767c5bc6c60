"""Pieces that stand in for sublayers: what they compute, and how a GPU's decode lowers them."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from adaskip_passes import FuseProjections
from adaskip_passes.partition.outer import Piece
from adaskip_passes.transforms.surrogates import SURROGATES, surrogate_examples, surrogate_piece

HIDDEN, RANK = 16, 3


def piece(kind: str, stream: torch.Tensor) -> Piece:
    return surrogate_piece(kind, RANK if kind == "low_rank" else 0, stream, ())


def inputs(kind: str, dtype: torch.dtype, tokens: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(1, tokens, HIDDEN, generator=generator).to(dtype)
    rank = RANK if kind == "low_rank" else 0
    tensors = surrogate_examples(kind, rank, stream).values()
    drawn = (torch.randn(t.shape, generator=generator).to(t.dtype) / 4 for t in tensors)
    return [stream, *drawn]


def expected(kind: str, given: list[torch.Tensor]) -> torch.Tensor:
    x, *tensors = [t.double() for t in given]
    if kind in ("scale", "diagonal"):
        return x * tensors[0]
    if kind == "low_rank":
        down, up, bias = tensors
        return x + x @ down.T @ up.T + bias
    weight, bias = tensors
    if kind == "normalized":
        return x + x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ weight.T + bias
    return x + x @ weight.T + bias


def run(module: fx.GraphModule, given: list[torch.Tensor]) -> torch.Tensor:
    result = fx.Interpreter(module).run(*given)
    output: torch.Tensor = result[0] if isinstance(result, tuple | list) else result
    return output


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_piece_computes_its_kind(kind: str, dtype: torch.dtype) -> None:
    given = inputs(kind, dtype, tokens=5)
    got = run(piece(kind, given[0]).module, given)
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected(kind, given), rtol=tolerance, atol=tolerance)
    if len(given) > 2:  # companion: the bias is one of its inputs
        wrong = [*given[:-1], given[-1] + 1]
        assert not torch.allclose(got, run(piece(kind, given[0]).module, wrong), atol=0.5)


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_decode_step_reads_its_weights_with_the_same_operator(
    kind: str, dtype: torch.dtype
) -> None:
    given = inputs(kind, dtype)
    module = piece(kind, given[0]).module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    lowered = fx.GraphModule(module, graph)
    FuseProjections()(lowered)
    calls = [n for n in lowered.graph.nodes if n.target is torch.ops.adaskip.project.default]
    maps = {"scale": 0, "diagonal": 0, "low_rank": 2, "linear": 1, "normalized": 1}
    assert len(calls) == maps[kind]
    if calls:  # the add after it is part of the last one
        names = [a.name for a in torch.ops.adaskip.project.default._schema.arguments]
        given_to = dict(zip(names, calls[-1].args, strict=False))
        assert given_to["residual"] is next(iter(lowered.graph.nodes))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        run(lowered, given).double(), expected(kind, given), rtol=tolerance, atol=tolerance
    )
