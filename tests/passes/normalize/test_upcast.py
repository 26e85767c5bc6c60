"""A stream that is wider than its embedding is as wide from the start."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, fx, nn

from adaskip_passes import Replacement, Skip, UnsupportedError, find_sublayers, link, run_passes
from adaskip_passes.normalize.upcast import Upcast
from tests.support.fx_decoders import (
    Block,
    Cut,
    Decoder,
    Shape,
    Slot,
    arguments,
    call,
    cut,
    step,
    trace,
)


class Wide(Block):
    """Mamba: a float32 stream in a bfloat16 model."""

    def attend(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return super().attend(x.to(self.norm1.weight.dtype), table, slot, start)

    def feed(self, x: Tensor) -> Tensor:
        return super().feed(x.to(self.norm2.weight.dtype))

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return x.to(torch.float32) + branch


class BranchFirst(Wide):
    """The norm reads the embedding as it is, and not through a cast."""

    def attend(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return super().attend(x * 2, table, slot, start)

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return branch + x.float()


class NarrowAgain(Wide):
    """Every sublayer gives the embedding's dtype again."""

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        return (x.to(torch.float32) + branch).to(self.norm1.weight.dtype)


def model_of(block: type[nn.Module], shape: Shape) -> Decoder:
    model = Decoder(shape, block)
    model.norm.float()
    model.head.float()
    return model


def graph_of(block: type[nn.Module], dtype: torch.dtype = torch.bfloat16) -> fx.GraphModule:
    shape = Shape(dtype=dtype)
    return trace(step, **arguments(model_of(block, shape), shape)).graph


@pytest.mark.parametrize("block", [Wide, BranchFirst])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stream_is_wide_from_the_start(block: type[nn.Module], dtype: torch.dtype) -> None:
    module = graph_of(block, dtype)
    graph = module.graph
    with pytest.raises(
        UnsupportedError, match=f"of {dtype} and gives .* of torch.float32; a skipped"
    ):
        find_sublayers(graph)
    assert Upcast()(module).changes == 1
    graph.lint()
    for s in find_sublayers(graph):
        assert s.stream.meta["example_value"].dtype == torch.float32
    assert Upcast()(module).changes == 0


@functools.cache
def cut_of(block: type[nn.Module]) -> Cut:
    shape = Shape(dtype=torch.bfloat16)
    return cut(model_of(block, shape), shape)


@pytest.mark.parametrize("block", [Wide, BranchFirst, NarrowAgain])
@pytest.mark.parametrize("skipped", [None, 0, 1, 2])
def test_it_computes_the_same(block: type[Wide], skipped: int | None) -> None:
    got = cut_of(block)
    without = {skipped: Replacement("nothing", None)} if skipped is not None else {}
    outer = run_passes(got.outer, (Skip(without),))
    args, again = (arguments(got.model, got.shape) for _ in range(2))
    (logits,) = call(link(outer, got.compiler), got, outer.graph, args)
    source = copy.deepcopy(got.model)
    if skipped is not None:
        layer, name = source.layers[skipped // 2], ("attend", "feed")[skipped % 2]
        setattr(layer, name, lambda x, *_: torch.zeros_like(x))
    assert torch.equal(logits, source(again["ids"], again["memory"]))


def test_equal_layers_are_equal_pieces() -> None:
    """The first layer's too: its casts read what theirs read."""
    shape = Shape(layers=3, dtype=torch.bfloat16)
    got = cut(model_of(Wide, shape), shape)
    args = arguments(got.model, got.shape)
    call(link(got.outer, got.compiler), got, got.outer.graph, args)
    assert got.compiler.compiled == 4


class WideInside(Block):
    """A branch adds in float32; the stream is bfloat16 throughout."""

    def feed(self, x: Tensor) -> Tensor:
        return (x.float() + super().feed(x).float()).to(x.dtype)

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        x = self.join(x, self.feed(x))
        return self.join(x, self.attend(x, table, slot, start))


CASES = [(Block, torch.float32), (Wide, torch.float32), (WideInside, torch.bfloat16)]


@pytest.mark.parametrize(("block", "dtype"), CASES)
def test_a_stream_of_one_dtype_is_left_alone(block: type[nn.Module], dtype: torch.dtype) -> None:
    module = graph_of(block, dtype)
    graph = module.graph
    before = str(graph)
    assert Upcast()(module).changes == 0
    assert str(graph) == before
