"""Residual adds over flattened tokens are written over the stream, where that is the same."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, fx, nn

from adaskip_passes import Replacement, Skip, find_sublayers, link, run_passes
from adaskip_passes.normalize.unflatten import Unflatten
from tests.support.fx_decoders import (
    Block,
    Cut,
    Decoder,
    Shape,
    Slot,
    arguments,
    call,
    cut_block,
    step,
    trace,
)


class Flat(Block):
    """OPT: the FFN is added to [batch * tokens, hidden]."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        x = x + self.attend(x, table, slot, start)
        flat = x.reshape(-1, x.shape[-1])
        return self.total(flat).view(x.shape)

    def total(self, flat: Tensor) -> Tensor:
        return flat + self.feed(flat)


class FlatFirst(Flat):
    def total(self, flat: Tensor) -> Tensor:
        return self.feed(flat) + flat


class FlatInPlace(Flat):
    """It overwrites the stream."""

    def total(self, flat: Tensor) -> Tensor:
        return flat.add_(self.feed(flat))


class FlatReadTwice(Flat):
    """The sum is read in its own shape as well."""

    def total(self, flat: Tensor) -> Tensor:
        total = flat + self.feed(flat)
        return total + total.mean()


class OtherShape(Flat):
    """What comes out has another shape than the stream."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return self.total(flat).view(1, -1, x.shape[-1])


def graph_of(block: type[nn.Module], layers: int = 2, batch: int = 2) -> fx.GraphModule:
    shape = Shape(layers=layers, batch=batch)
    return trace(step, **arguments(Decoder(shape, block), shape)).graph


@pytest.mark.parametrize("block", [Flat, FlatFirst])
def test_adds_are_written_over_the_stream(block: type[nn.Module]) -> None:
    module = graph_of(block)
    graph = module.graph
    assert Unflatten()(module).changes == 2
    graph.lint()
    found = find_sublayers(graph)
    assert [f"{s.layer}.{s.kind}" for s in found] == [
        "0.attention",
        "0.ffn",
        "1.attention",
        "1.ffn",
    ]
    assert {s.add.meta["example_value"].shape for s in found} == {torch.Size((2, 7, 8))}
    assert Unflatten()(module).changes == 0


@functools.cache
def cut_of(block: type[nn.Module], batch: int) -> Cut:
    return cut_block(block, batch=batch)


@pytest.mark.parametrize("block", [Flat, FlatFirst])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("skipped", [None, 1, 3])
def test_it_computes_the_same(block: type[nn.Module], batch: int, skipped: int | None) -> None:
    got = cut_of(block, batch)
    without = {skipped: Replacement("nothing", None)} if skipped is not None else {}
    outer = run_passes(got.outer, (Skip(without),))
    args, again = (arguments(got.model, got.shape, tokens=5) for _ in range(2))
    (logits,) = call(link(outer, got.compiler), got, outer.graph, args)
    source = copy.deepcopy(got.model)
    if skipped is not None:
        source.layers[skipped // 2].total = lambda flat: flat
    expected = source(again["ids"], again["memory"])
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [FlatInPlace, FlatReadTwice, OtherShape, Block])
def test_near_misses_are_left_alone(block: type[nn.Module]) -> None:
    module = graph_of(block, layers=1)
    graph = module.graph
    before = str(graph)
    assert Unflatten()(module).changes == 0
    assert str(graph) == before
