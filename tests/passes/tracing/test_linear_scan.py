"""Linear recurrences are captured as one operator, good for every length; other scans are not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaskip_passes.tracing.linear_scan import linear_scan
from tests.support.fx_decoders import trace

Pair = tuple[Tensor, Tensor]


def linear(left: Pair, right: Pair) -> Pair:
    return left[0] * right[0], right[0] * left[1] + right[1]


def backwards(left: Pair, right: Pair) -> Pair:
    return left[0] * right[0], left[0] * right[1] + left[1]


def sums(left: Pair, right: Pair) -> Pair:
    return left[0] + right[0], left[1] + right[1]


def scan(
    a: Tensor, b: Tensor, combine: Callable[[Pair, Pair], Pair], reverse: bool = False
) -> tuple[Tensor, ...]:
    from torch._higher_order_ops.associative_scan import associative_scan  # as models do

    return tuple(associative_scan(combine, (a, b), 1, reverse=reverse, combine_mode="generic"))


def operations(tokens: int, **more: Any) -> list[str]:
    a = torch.rand(2, tokens, 3)
    captured = trace(scan, a=a, b=torch.rand(2, tokens, 3), **more)
    nodes = captured.graph.graph.nodes
    return [str(n.target) for n in nodes if n.op not in ("placeholder", "output")]


def test_a_linear_recurrence_is_one_operator() -> None:
    for tokens in (4, 5, 31):
        assert sum("linear_scan" in o for o in operations(tokens, combine=linear)) == 1


@pytest.mark.parametrize(
    "more", [{"combine": backwards}, {"combine": sums}, {"combine": linear, "reverse": True}]
)
def test_any_other_scan_is_traced(more: dict[str, Any]) -> None:
    """Near misses, among them the same polynomial with its sides exchanged."""
    assert not any("linear_scan" in o for o in operations(5, **more))


@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([0, 1, 2]), st.integers(0, 99))
def test_it_is_the_recurrence(batch: int, tokens: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, batch, tokens, 3, generator=generator, dtype=torch.float64).movedim(2, 1)
    a, b = (t.movedim(0, dim) for t in (a, b))
    product, states = linear_scan(a, b, dim)
    wide_a, wide_b = (np.moveaxis(t.numpy(), dim, 0) for t in (a, b))
    factor, state = np.ones_like(wide_a[0]), np.zeros_like(wide_b[0])
    for i, (x, y) in enumerate(zip(wide_a, wide_b, strict=True)):
        factor, state = factor * x, x * state + y
        np.testing.assert_allclose(product.movedim(dim, 0)[i].numpy(), factor, rtol=1e-12)
        np.testing.assert_allclose(states.movedim(dim, 0)[i].numpy(), state, rtol=1e-12)


def test_it_gives_what_the_traced_scan_gives() -> None:
    a, b = torch.rand(2, 2, 13, 3)
    for got, expected in zip(linear_scan(a, b, 1), scan(a, b, linear), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_scan_is_as_it_was_after_a_capture() -> None:
    module = importlib.import_module("torch._higher_order_ops.associative_scan")
    before = module.associative_scan
    operations(4, combine=linear)
    assert module.associative_scan is before


def test_the_operator_is_what_it_says_it_is() -> None:
    """Shapes and strides of its fake form, no aliases, no writes."""
    a, b = torch.rand(2, 2, 5, 3)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(linear_scan, (a, b, 1), test_utils=checks)
