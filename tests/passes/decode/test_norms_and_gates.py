"""Norms and gates as Gemma has them are parts of projections: ``1 + weight``, and GELU by tanh."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

from adaskip_passes.decode.projection_ops import normalize, project
from tests.passes.decode.test_fuse_projections import (
    DTYPES,
    EPS,
    NORMALIZE,
    TOLERANCE,
    WIDTH,
    arguments,
    calls,
    error,
    fused,
    rest,
    scale,
    stream,
    weights,
)


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers writes it."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + weight.float())).type_as(x)


def late_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As GPT-OSS and OLMo 2 have it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (weight * wide).to(x.dtype)


def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(linear(x, gate), approximate="tanh") * linear(x, up)


# The pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_is_added_to_a_norms_weight(dtype: torch.dtype) -> None:
    def function(x: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Any:
        h = gemma_norm(x, n)
        return linear(h, q), linear(h, k)

    module = fused(function, stream(dtype=dtype), scale(dtype), *weights(12, 8, dtype=dtype))
    (call,) = calls(module)
    assert rest(module) == set()
    got = arguments(call)
    assert (str(got["x"]), str(got["norm"]), got["eps"], got["offset"]) == ("x", "n", EPS, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_in_float32_is_part_of_the_call(dtype: torch.dtype) -> None:
    x, n, (w,) = stream(dtype=dtype), scale(dtype), weights(8, dtype=dtype)
    module = fused(lambda x, n, w: linear(late_norm(x, n), w), x, n, w)
    (call,) = calls(module)
    assert rest(module) == set()
    assert (str(arguments(call)["norm"]), arguments(call)["offset"]) == ("n", 0.0)


def test_of_several_rows_it_is_an_operator_of_its_own() -> None:
    half = torch.bfloat16
    module = fused(
        lambda x, n, w: linear(gemma_norm(x, n), w),
        stream(3, half),
        scale(half),
        *weights(8, dtype=half),
    )
    (norm,) = module.graph.find_nodes(op="call_function", target=NORMALIZE)
    assert norm.args[2:] == (EPS, 1.0, None, False)
    assert arguments(calls(module)[0])["norm"] is None


def mixer_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """As Mamba 2 has it: of something in float32, seen as groups."""
    wide = x.to(torch.float32) * functional.silu(gate.to(torch.float32))
    groups = wide.view(-1, 1, 1, WIDTH)
    normed = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * normed.view(-1, 1, WIDTH).to(x.dtype)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_a_norm_reads_may_be_wider(rows: int) -> None:
    dtype = torch.bfloat16

    def function(x: Tensor, gate: Tensor, n: Tensor, w: Tensor) -> Tensor:
        return linear(mixer_norm(x, gate, n).to(dtype), w)

    x, gate = stream(rows, dtype), stream(rows, dtype)
    n, (w,) = scale(dtype), weights(8, dtype=dtype)
    module = fused(function, x, gate, n, w)
    assert "rsqrt" not in rest(module)
    (call,) = calls(module)
    assert (arguments(call)["norm"] is not None) == (rows == 1)
    wide = x.double() * functional.silu(gate.double())
    want = linear(wide_norm(wide, n, 0.0), w.double())
    assert error(module(x, gate, n, w), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_larger_than_any_half_is_not_rounded_first(rows: int) -> None:
    half = torch.float16

    def function(x: Tensor, gate: Tensor, n: Tensor, w: Tensor) -> Tensor:
        return linear(mixer_norm(x, gate, n).to(half), w)

    x, gate = (1000 * stream(rows, torch.float32)).to(half), (1000 * stream(rows)).to(half)
    n, (w,) = scale(half), weights(8, dtype=half)
    assert (x * functional.silu(gate)).isinf().any()
    module = fused(function, x, gate, n, w)
    assert "rsqrt" not in rest(module)
    wide = x.double() * functional.silu(gate.double())
    want = linear(wide_norm(wide, n, 0.0), w.double())
    assert error(module(x, gate, n, w), want) < TOLERANCE[half]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_stream_in_float32_is_rounded_nowhere(rows: int, dtype: torch.dtype) -> None:
    """As Mamba has it: the norm reads a rounded stream, and what is added to it is half as wide."""

    def function(h: Tensor, n: Tensor, up: Tensor, down: Tensor) -> Tensor:
        x = linear(late_norm(h.to(dtype), n), up)
        return h + linear(torch.tanh(x), down)

    h, n = stream(rows, torch.float32), scale(dtype)
    up, down = weights(WIDTH, WIDTH, dtype=dtype)
    module = fused(function, h, n, up, down)
    first, last = calls(module)
    norms = module.graph.find_nodes(op="call_function", target=NORMALIZE)
    assert rest(module) == {"tanh"} | ({"normalize.default"} if norms else set())
    assert str(norms[0].args[0] if rows > 1 else arguments(first)["x"]) == "h"
    assert str(arguments(last)["residual"]) == "h"
    got = module(h, n, up, down)
    assert got.dtype == torch.float32
    x = linear(wide_norm(h.double(), n, 0.0), up.double())
    want = h.double() + linear(torch.tanh(x), down.double())
    assert error(got, want) < TOLERANCE[dtype]
    assert error(got.to(dtype), want) > error(got, want)


def test_a_stream_that_is_rounded_more_than_a_norm_is_stays_so() -> None:
    """From float64, or to float32."""

    def function(h: Tensor, n: Tensor, w: Tensor) -> Tensor:
        return linear(late_norm(h.to(n.dtype), n), w)

    h, n, w = stream(1, torch.float64), scale(torch.float32), weights(8)
    module = fused(function, h, n, *w)
    assert str(arguments(calls(module)[0])["x"]) != "h"
    assert "to" in rest(module)


def test_a_norm_that_is_seen_in_another_shape_stays() -> None:
    def function(x: Tensor, n: Tensor, w: Tensor) -> Tensor:
        return linear(late_norm(x, n).view(-1, WIDTH), w)

    x, n, (w,) = stream(), scale(), weights(8)
    module = fused(function, x, n, w)
    assert arguments(calls(module)[0])["norm"] is None
    assert module(x, n, w).shape == function(x, n, w).shape


def added_in_half(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + weight)).type_as(x)


def subtracted(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 - weight.float())).type_as(x)


def rounded_between(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed.to(x.dtype) * (1.0 + weight.float())).type_as(x)


@pytest.mark.parametrize("norm", [added_in_half, subtracted, rounded_between])
def test_another_norm_stays(norm: Any) -> None:
    half = torch.bfloat16
    module = fused(
        lambda x, n, w: linear(norm(x, n), w), stream(1, half), scale(half), *weights(8, dtype=half)
    )
    (call,) = calls(module)
    assert arguments(call)["norm"] is None
    assert "rsqrt" in rest(module)


@pytest.mark.parametrize("turned", [False, True])
def test_a_gelu_by_tanh_is_part_of_the_call(turned: bool) -> None:
    def function(x: Tensor, a: Tensor, b: Tensor) -> Any:
        return gated(x, b, a) if turned else gated(x, a, b)

    module = fused(function, stream(), *weights(8, 8))
    (call,) = calls(module)
    assert rest(module) == set()
    got = arguments(call)
    assert got["activation"] == "gelu_tanh"
    assert [str(w) for w in got["weights"]] == (["b", "a"] if turned else ["a", "b"])


# The operators ----------------------------------------------------------------------------------


def wide_norm(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_against_float64(dtype: torch.dtype, offset: float) -> None:
    x, weight = stream(5, dtype), scale(dtype)
    expected = wide_norm(x, weight, offset)
    got = normalize(x, weight, EPS, offset)
    assert got.dtype == dtype
    assert error(got, expected) < TOLERANCE[dtype]
    assert error(normalize(x, weight, EPS, 1 - offset), expected) > 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_against_float64(dtype: torch.dtype) -> None:
    x, n, (a, b) = stream(1, dtype), scale(dtype), weights(9, 9, dtype=dtype)
    h = wide_norm(x, n, 1.0)
    gate, up = h @ a.double().T, h @ b.double().T
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    expected = gate * (1 + inner.tanh()) / 2 * up
    (got,) = project(x, [a, b], [], n, EPS, "gelu_tanh", None, 1.0)
    assert error(got, expected) < 2 * TOLERANCE[dtype]
    (wrong,) = project(x, [a, b], [], n, EPS, "silu", None, 1.0)
    assert error(wrong, expected) > 0.05


def test_they_are_proper_operators() -> None:
    x, n, (a, b) = stream(1), scale(), weights(9, 9)
    torch.library.opcheck(NORMALIZE, (x, n, EPS, 1.0))
    given = (x, [a, b], [], n, EPS, "gelu_tanh", None, 1.0)
    torch.library.opcheck(torch.ops.adaskip.project.default, given)
