"""Attention rotates its queries and new keys itself where that is all that was done to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from adaskip_passes.decode.fuse_rotary import FuseRotary
from adaskip_passes.decode.ops import EVERY
from tests.passes.decode.test_fuse_projections import Record
from tests.support.eager_reference import relative_error

STORE_AND_ATTEND = torch.ops.adaskip.store_and_attend.default
#: q, keys, values, k, v, cos, sin, bounds
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def half(x: Tensor) -> Tensor:
    """As transformers writes it, for heads of 8 numbers."""
    first, second = x[..., :4], x[..., 4:]
    return torch.cat((-second, first), dim=-1)


def attend(q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Any:
    return STORE_AND_ATTEND(q, keys, values, k, v, None, None, bounds, 0.5, 0.0, None)


def rotary(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    return attend(q * c + half(q) * s, keys, values, k * c + half(k) * s, v, b)


def other_order(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    return attend(s * half(q) + c * q, keys, values, half(k) * s + k * c, v, b)


def by_halves(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    """As GPT-OSS has it, with an angle for each pair."""

    def turned(x: Tensor) -> Tensor:
        first, second = torch.chunk(x, 2, dim=-1)
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    return attend(turned(q), keys, values, turned(k), v, b)


def halves_in_other_order(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    def turned(x: Tensor) -> Tensor:
        first, second = x[..., :4], x[..., 4:]
        return torch.cat((c * first - s * second, s * first + c * second), -1)

    return attend(turned(q), keys, values, turned(k), v, b)


def a_part_that_is_all(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    """As Phi-3 has it."""

    def turned(x: Tensor) -> Tensor:
        part, others = x[..., :8], x[..., 8:]
        return torch.cat([part * c + half(part) * s, others], dim=-1)

    return attend(turned(q), keys, values, turned(k), v, b)


def halves_backwards(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    def turned(x: Tensor) -> Tensor:
        first, second = torch.chunk(x, 2, dim=-1)
        return torch.cat((second * c - first * s, first * c + second * s), dim=-1)

    return attend(turned(q), keys, values, turned(k), v, b)


def halves_of_neighbours(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    def turned(x: Tensor) -> Tensor:
        first, second = x[..., ::2], x[..., 1::2]
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    return attend(turned(q), keys, values, turned(k), v, b)


def read_besides(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    turned = k * c + half(k) * s
    return attend(q * c + half(q) * s, keys, values, turned, v, b) + turned.sum()


def keys_alone(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    return attend(q, keys, values, k * c + half(k) * s, v, b)


def other_angles(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    return attend(q * c + half(q) * s, keys, values, k * s + half(k) * c, v, b)


def backwards(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    def turned(x: Tensor) -> Tensor:
        return x * c + torch.cat((x[..., 4:], -x[..., :4]), dim=-1) * s

    return attend(turned(q), keys, values, turned(k), v, b)


def uneven(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    def turned(x: Tensor) -> Tensor:
        return x * c + torch.cat((-x[..., 3:], x[..., :3]), dim=-1) * s

    return attend(turned(q), keys, values, turned(k), v, b)


def overwritten(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Tensor
) -> Any:
    turned = q * c + half(q) * s, k * c + half(k) * s
    q.zero_()
    return attend(turned[0], keys, values, turned[1], v, b)


def inputs(rows: int = 2, tokens: int = 3, by_row: bool = False, heads: int = 1) -> Inputs:
    torch.manual_seed(rows + tokens)
    bounds = torch.tensor([[[[1, 0, EVERY, 6, 0]]], [[[0, 0, 4, 6, 0]]]])[:rows]
    keys, values = (torch.randn(rows, 2, 12, 8) for _ in range(2))
    k, v = (torch.randn(rows, 2, tokens, 8) for _ in range(2))
    angles = torch.randn(rows if by_row else 1, heads, tokens, 8)
    q = torch.randn(rows, 4, tokens, 8)
    return q, keys, values, k, v, angles.cos(), angles.sin(), bounds


def both(function: Callable[..., Any], given: Inputs) -> tuple[fx.GraphModule, float]:
    """The graph after the pass, and how far results and buffers are from the function's."""
    module = fx.symbolic_trace(function)
    Record(module).run(*[t.clone() for t in given])
    FuseRotary()(module)
    module.graph.lint()
    module.recompile()
    mine, theirs = ([t.clone() for t in given] for _ in range(2))
    got, expected = module(*mine), function(*theirs)
    pairs = [(got, expected), *zip(mine, theirs, strict=True)]
    return module, max(relative_error(a.double(), b.double()) for a, b in pairs)


def rotates(module: fx.GraphModule) -> bool:
    (call,) = module.graph.find_nodes(op="call_function", target=STORE_AND_ATTEND)
    return call.args[5] is not None


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([rotary, other_order]), st.integers(1, 2), st.integers(1, 5), st.booleans())
def test_rotations_become_part_of_attention(
    function: Callable[..., Any], rows: int, tokens: int, by_row: bool
) -> None:
    module, error = both(function, inputs(rows, tokens, by_row))
    assert rotates(module)
    assert not module.graph.find_nodes(op="call_function", target=torch.cat)
    assert error < 1e-6


def test_keys_that_are_read_besides_are_rotated_for_them_too() -> None:
    module, error = both(read_besides, inputs())
    assert rotates(module)
    assert len(module.graph.find_nodes(op="call_function", target=torch.cat)) == 1
    assert error < 1e-6


@pytest.mark.parametrize("function", [keys_alone, other_angles, backwards, uneven, overwritten])
def test_what_is_another_rotation_stays(function: Callable[..., Any]) -> None:
    module, error = both(function, inputs())
    assert not rotates(module)
    assert error == 0


def test_angles_of_another_dtype_stay() -> None:
    """Rotated in float32, keys would be stored in float32."""
    q, keys, values, k, v, c, s, b = inputs()
    half_precision = [t.to(torch.bfloat16) for t in (q, keys, values, k, v)]
    module = fx.symbolic_trace(rotary)
    for node, value in zip(
        module.graph.find_nodes(op="placeholder"), (*half_precision, c, s, b), strict=True
    ):
        node.meta["example_value"] = value
    FuseRotary()(module)
    assert not rotates(module)


def test_angles_of_different_rows_stay() -> None:
    q, keys, values, k, v, c, s, b = inputs()
    module, error = both(rotary, (q, keys, values, k, v, c, torch.cat((s, s * 2)), b))
    assert not rotates(module)
    assert error == 0


def test_angles_of_each_head_stay() -> None:
    q, keys, values, k, v, c, s, b = inputs(heads=2)
    module, error = both(rotary, (q[:, :2], keys, values, k, v, c, s, b))
    assert not rotates(module)
    assert error == 0


@pytest.mark.breaks
def test_swapped_angles_are_noticed() -> None:
    """The companion."""
    given = inputs()
    module, _ = both(rotary, given)
    (call,) = module.graph.find_nodes(op="call_function", target=STORE_AND_ATTEND)
    call.args = (*call.args[:5], call.args[6], call.args[5], *call.args[7:])
    module.recompile()
    got, expected = module(*[t.clone() for t in given]), rotary(*[t.clone() for t in given])
    assert relative_error(got.double(), expected.double()) > 1e-2


def test_a_part_may_be_all_of_a_head() -> None:
    module, error = both(a_part_that_is_all, inputs())
    assert rotates(module)
    assert error < 1e-6


@pytest.mark.parametrize("function", [by_halves, halves_in_other_order])
@pytest.mark.parametrize(("rows", "tokens", "by_row"), [(1, 1, False), (2, 3, True)])
def test_halves_that_are_written_out_are_rotations(
    function: Callable[..., Any], rows: int, tokens: int, by_row: bool
) -> None:
    module, error = both(function, of_pairs(inputs(rows, tokens, by_row)))
    assert rotates(module)
    assert not module.graph.find_nodes(op="call_function", target=torch.cat)
    assert error < 1e-6


@pytest.mark.parametrize("function", [halves_backwards, halves_of_neighbours])
def test_halves_of_something_else_stay(function: Callable[..., Any]) -> None:
    module, error = both(function, of_pairs(inputs()))
    assert not rotates(module)
    assert error == 0


def of_pairs(given: Inputs) -> Inputs:
    """The same inputs with an angle for each pair."""
    *before, cosines, sines, bounds = given
    return (*before, cosines[..., :4], sines[..., :4], bounds)  # type: ignore[return-value]
