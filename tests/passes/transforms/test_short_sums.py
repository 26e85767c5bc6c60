"""Sums over a few neighbours are written out, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from adaskip_passes.transforms.short_sums import MOST, WriteOutShortSums


def passed(function: Callable[[Tensor], Any], x: Tensor) -> tuple[fx.GraphModule, int]:
    """The traced function after the pass, and how many sums were written out."""
    traced = fx.symbolic_trace(function)
    values = {n: x for n in traced.graph.find_nodes(op="placeholder")}
    for node in traced.graph.nodes:
        node.meta["example_value"] = values.get(node, x)
    result = WriteOutShortSums()(traced)
    traced.recompile()
    return traced, result.changes


def sums(module: fx.GraphModule) -> int:
    return sum("sum" in str(n.target) for n in module.graph.nodes)


@given(st.integers(1, MOST), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 1))
def test_the_sum_is_the_same(count: int, dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(count)
    x = torch.randn((3, count, 5) if dim else (count, 3, 5)).to(dtype)
    module, changes = passed(lambda x: x.sum(dim=dim), x)
    assert changes == 1
    assert sums(module) == 0
    got, want = module(x), x.double().sum(dim)
    assert got.dtype == dtype
    exact = dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6 if exact else 2**-8, atol=1e-6)


@pytest.mark.breaks
def test_a_number_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    from adaskip_passes.transforms import short_sums

    found = short_sums._short
    monkeypatch.setattr(short_sums, "_short", lambda n: (f := found(n)) and (f[0], f[1], f[2] - 1))
    x = torch.randn(3, 4, 5)
    module, _ = passed(lambda x: x.sum(1), x)
    assert not torch.allclose(module(x), x.sum(1))


@pytest.mark.parametrize(
    ("function", "shape", "dtype"),
    [
        (lambda x: x.sum(-1), (2, 3, 4), torch.float32),
        (lambda x: x.sum(), (2, 3, 4), torch.float32),
        (lambda x: x.sum(1), (2, MOST + 1, 4), torch.float32),
        (lambda x: x.sum(1), (2, 3, 4), torch.int64),
        (lambda x: x.sum(1, keepdim=True), (2, 3, 4), torch.float32),
        (lambda x: x.sum(1, True), (2, 3, 4), torch.float32),
        (lambda x: x.sum(1, dtype=torch.float64), (2, 3, 4), torch.float32),
        (lambda x: x.sum((0, 1)), (2, 3, 4), torch.float32),
        (lambda x: x.cumsum(1), (2, 3, 4), torch.float32),
    ],
)
def test_others_are_left_alone(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.ones(shape).to(dtype)
    module, changes = passed(function, x)
    assert changes == 0
    assert torch.equal(module(x), function(x))


def test_what_those_are_near_to() -> None:
    x = torch.randn(2, MOST, 4)
    assert passed(lambda x: x.sum(1), x)[1] == passed(lambda x: torch.sum(x, dim=-2), x)[1] == 1
