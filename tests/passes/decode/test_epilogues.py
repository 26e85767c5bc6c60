"""Layer norms, activations, halves that gate and factors are parts of projections."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import gelu, linear, relu, silu

from adaskip_passes.decode.projection_ops import ACTIVATIONS, normalize, project
from tests.passes.decode.test_fuse_projections import (
    DTYPES,
    EPS,
    NORMALIZE,
    PROJECT,
    TOLERANCE,
    WIDTH,
    arguments,
    biases,
    calls,
    error,
    fused,
    random,
    rest,
    rms_norm,
    scale,
    stream,
    weights,
)

HALF = torch.bfloat16
Function = Callable[..., Any]


# Layer norms ------------------------------------------------------------------------------------


def torchs(x: Tensor, n: Tensor, s: Tensor) -> Tensor:
    return functional.layer_norm(x, (WIDTH,), n, s, EPS)


def torchs_without_bias(x: Tensor, n: Tensor, s: Tensor) -> Tensor:
    return functional.layer_norm(x, (WIDTH,), weight=n, eps=EPS)


def coheres(x: Tensor, n: Tensor, s: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    x = (x - mean) * torch.rsqrt(variance + EPS)
    return (n.to(torch.float32) * x).to(dtype)


LAYER_NORMS = {"torch": torchs, "no bias": torchs_without_bias, "cohere": coheres}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYER_NORMS)
def test_a_layer_norm_is_part_of_the_call(name: str, dtype: torch.dtype) -> None:
    def function(x: Tensor, n: Tensor, s: Tensor, q: Tensor, k: Tensor) -> Any:
        h = LAYER_NORMS[name](x, n, s)
        return linear(h, q), linear(h, k)

    (shift,) = biases(WIDTH, dtype=dtype)
    module = fused(function, stream(1, dtype) + 2, scale(dtype), shift, *weights(8, 8, dtype=dtype))
    (call,) = calls(module)
    assert rest(module) == set()
    got = arguments(call)
    assert (str(got["x"]), str(got["norm"]), got["eps"], got["centered"]) == ("x", "n", EPS, True)
    assert str(got["shift"]) == ("s" if name == "torch" else "None")


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_a_layer_norm_of_several_rows_is_an_operator_of_its_own(name: str) -> None:
    def function(x: Tensor, n: Tensor, s: Tensor, w: Tensor) -> Tensor:
        return linear(LAYER_NORMS[name](x, n, s), w)

    (shift,) = biases(WIDTH, dtype=HALF)
    given = stream(3, HALF) + 2, scale(HALF), shift, *weights(8, dtype=HALF)
    module = fused(function, *given)
    (norm,) = module.graph.find_nodes(op="call_function", target=NORMALIZE)
    assert (norm.args[2:4], norm.args[5]) == ((EPS, 0.0), True)
    (call,) = calls(module)
    assert [arguments(call)[key] for key in ("norm", "shift", "centered")] == [None, None, False]


def of_the_middle(x: Tensor, n: Tensor, s: Tensor) -> Tensor:
    """Another number is subtracted in one of both places."""
    wide = x.to(torch.float32)
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean / 2).pow(2).mean(-1, keepdim=True)
    return n * ((wide - mean) * torch.rsqrt(variance + EPS))


NOT_LAYER_NORMS: dict[str, Function] = {
    "of the middle": of_the_middle,
    "no weight": lambda x, n, s: functional.layer_norm(x, (WIDTH,)) * 2,
    "a computed weight": lambda x, n, s: functional.layer_norm(x, (WIDTH,), torch.tanh(n)),
    "a computed bias": lambda x, n, s: functional.layer_norm(x, (WIDTH,), n, torch.tanh(s)),
    "of all dimensions": lambda x, n, s: functional.layer_norm(
        x.view(4, 4), (4, 4), n.view(4, 4)
    ).view(1, 1, WIDTH),
}


@pytest.mark.parametrize("name", NOT_LAYER_NORMS)
def test_another_layer_norm_stays(name: str) -> None:
    def function(x: Tensor, n: Tensor, s: Tensor, w: Tensor) -> Any:
        return linear(NOT_LAYER_NORMS[name](x, n, s), w)

    module = fused(function, stream() + 2, scale(), *biases(WIDTH), *weights(8))
    (call,) = calls(module)
    assert arguments(call)["norm"] is None


def test_a_difference_from_another_mean_has_an_rms_norm() -> None:
    """It is one of what is left when that is subtracted."""

    def function(x: Tensor, n: Tensor, w: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        mean = wide.mean(0, keepdim=True) / 3
        variance = (wide - mean).pow(2).mean(-1, keepdim=True)
        return linear(n * ((wide - mean) * torch.rsqrt(variance + EPS)), w)

    (call,) = calls(fused(function, stream() + 2, scale(), *weights(8)))
    assert (str(arguments(call)["norm"]), arguments(call)["centered"]) == ("n", False)


# Activations ------------------------------------------------------------------------------------


def new_gelu(x: Tensor) -> Tensor:
    """As transformers writes it for GPT-2, Phi and others."""
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


FUNCTIONS: dict[str, tuple[Function, str]] = {
    "silu": (silu, "silu"),
    "gelu": (gelu, "gelu"),
    "gelu, none": (lambda x: gelu(x, approximate="none"), "gelu"),
    "gelu, tanh": (lambda x: gelu(x, approximate="tanh"), "gelu_tanh"),
    "new gelu": (new_gelu, "gelu_tanh"),
    "relu": (relu, "relu"),
    "relu, not in place": (lambda x: relu(x, inplace=False), "relu"),
    "squared": (lambda x: torch.square(relu(x)), "relu_squared"),
    "power": (lambda x: torch.pow(relu(x), 2), "relu_squared"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_is_part_of_the_call(name: str, dtype: torch.dtype) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return FUNCTIONS[name][0](linear(x, w, b))

    given = *weights(12, dtype=dtype), *biases(12, dtype=dtype)
    module = fused(function, stream(1, dtype), *given)
    (call,) = calls(module)
    assert rest(module) == set()
    assert arguments(call)["activation"] == FUNCTIONS[name][1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_may_be_a_gates(name: str) -> None:
    def function(x: Tensor, a: Tensor, b: Tensor) -> Any:
        return linear(x, b) * FUNCTIONS[name][0](linear(x, a))

    module = fused(function, stream(), *weights(8, 8))
    (call,) = calls(module)
    assert rest(module) == set()
    got = arguments(call)
    assert (got["activation"], [str(w) for w in got["weights"]]) == (
        FUNCTIONS[name][1],
        ["a", "b"],
    )


def almost_new_gelu(**changes: Any) -> Function:
    of = {"half": 0.5, "one": 1.0, "root": math.sqrt(2.0 / math.pi), "cube": 0.044715, "power": 3.0}
    of |= changes

    def function(x: Tensor) -> Tensor:
        inner = of["root"] * (x + of["cube"] * torch.pow(x, of["power"]))
        return of["half"] * x * (of["one"] + torch.tanh(inner))

    return function


OTHERS: dict[str, tuple[Function, set[str]]] = {
    "half": (almost_new_gelu(half=0.4), {"tanh"}),
    "one": (almost_new_gelu(one=2.0), {"tanh"}),
    "root": (almost_new_gelu(root=0.7), {"tanh"}),
    "cube": (almost_new_gelu(cube=0.04), {"tanh"}),
    "power": (almost_new_gelu(power=2.0), {"tanh"}),
    "read besides": (lambda y: (silu(y), y + 1), {"silu"}),
    "new gelu, read besides": (lambda y: (new_gelu(y), y + 1), {"tanh"}),
    "leaky": (lambda y: functional.leaky_relu(y), {"leaky_relu"}),
    "sigmoid": (torch.sigmoid, {"sigmoid"}),
    "relu is read besides": (lambda y: (lambda r: (torch.square(r), r))(relu(y)), {"square"}),
    "a cube": (lambda y: torch.pow(relu(y), 3), {"pow"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_activation_stays(name: str) -> None:
    function, left = OTHERS[name]
    module = fused(lambda x, w: function(linear(x, w)), stream(), *weights(8))
    assert left <= rest(module)


def test_an_activation_in_place_is_right() -> None:
    fused(lambda x, w: relu(linear(x, w), inplace=True) + 1, stream(), *weights(8))
    fused(lambda x, w: silu(linear(x, w)).mul_(2), stream(), *weights(8))


# Halves that gate -------------------------------------------------------------------------------

HALVES: dict[str, Function] = {
    "chunk": lambda y: y.chunk(2, dim=-1),
    "torch.chunk": lambda y: torch.chunk(y, 2, -1),
    "slices": lambda y: (y[..., :8], y[..., 8:]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", HALVES)
def test_halves_of_one_projection_gate_each_other(
    name: str, bias: bool, gate_first: bool, dtype: torch.dtype
) -> None:
    def function(x: Tensor, n: Tensor, w: Tensor, b: Tensor) -> Any:
        h = functional.layer_norm(x, (WIDTH,), n, None, EPS)
        halves = HALVES[name](linear(h, w, b if bias else None))
        gate, up = (halves[0], halves[1]) if gate_first else (halves[1], halves[0])
        return up * silu(gate)

    given = *weights(16, dtype=dtype), *biases(16, dtype=dtype)
    module = fused(function, stream(1, dtype), scale(dtype), *given)
    (call,) = calls(module)
    assert rest(module) == set()
    got = arguments(call)
    assert got["activation"] == "silu"
    parts = [slice(None, 8), slice(8, None)][:: 1 if gate_first else -1]
    assert [w.args[1] for w in got["weights"]] == parts
    assert [b.args[1] for b in got["biases"]] == (parts if bias else [])


NOT_HALVES: dict[str, Function] = {
    "three": lambda y: (lambda a: silu(a[0]) * a[1])(y.chunk(3, dim=-1)),
    "of rows": lambda y: (lambda a: silu(a[0]) * a[1])(y.view(2, 8).chunk(2, dim=-1)),
    "neighbours": lambda y: silu(y[..., ::2]) * y[..., 1::2],
    "the same": lambda y: (lambda a: silu(a[0]) * a[0])(y.chunk(2, dim=-1)),
    "read besides": lambda y: (lambda a: (silu(a[0]) * a[1], a[1] + 1))(y.chunk(2, dim=-1)),
    "all is read besides": lambda y: (silu(y[..., :8]) * y[..., 8:], y + 1),
    "overlapping": lambda y: silu(y[..., :9]) * y[..., 7:],
}


@pytest.mark.parametrize("name", NOT_HALVES)
def test_what_are_not_halves_stays(name: str) -> None:
    outs = 18 if name == "three" else 16
    module = fused(lambda x, w: NOT_HALVES[name](linear(x, w)), stream(), *weights(outs))
    assert "silu" in rest(module)


def test_halves_that_kernels_cannot_read_fast_stay() -> None:
    """The second would begin between two reads of 16 bytes."""

    def function(x: Tensor, w: Tensor) -> Any:
        gate, up = linear(x, w).chunk(2, -1)
        return silu(gate) * up

    x, w = random(1, 1, 7, dtype=HALF), random(6, 7, dtype=HALF)
    assert "silu" in rest(fused(function, x, w))


# Factors ----------------------------------------------------------------------------------------

FACTORS: dict[str, tuple[Function, float, bool]] = {
    # what is computed, the factor, and whether there is a residual
    "granite": (lambda h, y: h + y * 0.22, 0.22, True),
    "number first": (lambda h, y: 0.22 * y + h, 0.22, True),
    "cohere's logits": (lambda h, y: y * 0.0625, 0.0625, False),
    "granite's logits": (lambda h, y: y / 8.0, 0.125, False),
    "an integer": (lambda h, y: h + y * 2, 2.0, True),
    "twice": (lambda h, y: h + y * 2 * 3, 6.0, True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_is_part_of_the_call(name: str, dtype: torch.dtype) -> None:
    function, factor, has_residual = FACTORS[name]
    module = fused(
        lambda h, x, w: function(h, linear(x, w)),
        stream(1, dtype) * 2,
        stream(1, dtype),
        *weights(WIDTH, dtype=dtype),
    )
    (call,) = calls(module)
    assert rest(module) == set()
    got = arguments(call)
    assert (got["factors"], got["residual"] is not None) == ([factor], has_residual)


def falcon_h1(x: Tensor, n: Tensor, q: Tensor, k: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Its factors: of what attention and an FFN read, of keys in heads, of a gate and a result."""
    h = rms_norm(x, n) * 0.7
    keys = linear(h, k).view(-1, 1, 4, WIDTH // 4).transpose(1, 2) * 0.3
    x = x + linear(linear(h, q) + keys.transpose(1, 2).reshape(-1, 1, WIDTH), down) * 0.9
    h = rms_norm(x, n)
    return x + linear(linear(h, up) * silu(linear(h, q) * 1.5), down) * 0.4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_of_projections_of_one_input(dtype: torch.dtype) -> None:
    module = fused(falcon_h1, stream(1, dtype), scale(dtype), *weights(*[WIDTH] * 4, dtype=dtype))
    assert rest(module) <= {"view", "transpose", "reshape", "add"}
    found = [arguments(call) for call in calls(module)]
    assert [got["norm"] is not None for got in found] == [True, False, True, False]
    first, *others = [[round(f, 6) for f in got["factors"]] for got in found]
    assert sorted(first) == [0.21, 0.7]
    assert others == [[0.9], [1.5, 1.0], [0.4]]
    assert [got["activation"] for got in found] == ["", "", "silu", ""]


NOT_MOVED: dict[str, Function] = {
    "a bias is not multiplied": lambda x, w: linear(x * 2, w, w[0]),
    "what it reads is written": lambda x, w: linear((x * 2).mul_(3), w),
    "a view is read twice": lambda x, w: (lambda v: v * 2 + v)(linear(x, w).view(-1, WIDTH)),
    "it changes the dtype": lambda x, w: linear(x, w).view(-1, WIDTH).double() * 2,
}


@pytest.mark.parametrize("name", NOT_MOVED)
def test_what_is_multiplied_otherwise_stays(name: str) -> None:
    module = fused(NOT_MOVED[name], stream(), *weights(WIDTH))
    assert rest(module) & {"mul", "mul_"}


NOT_FACTORS: dict[str, tuple[Function, set[str]]] = {
    "a tensor": (lambda h, y: h[..., :1] * y, {"mul"}),
    "after the sum": (lambda h, y: (h + y) * 2, {"mul"}),
    "read besides": (lambda h, y: (y * 2, y + 1), {"mul", "add"}),
    "divides": (lambda h, y: 2.0 / y, {"truediv"}),
    "by a third": (lambda h, y: y / 3.0, {"truediv"}),
    "the product is written": (lambda h, y: (y * 2).add_(1), {"mul", "add_"}),
}


@pytest.mark.parametrize("name", NOT_FACTORS)
def test_another_factor_stays(name: str) -> None:
    function, left = NOT_FACTORS[name]
    module = fused(
        lambda h, x, w: function(h, linear(x, w)), stream() * 2, stream(), *weights(WIDTH)
    )
    assert rest(module) == left


# Routers in float32 -----------------------------------------------------------------------------


def logits(x: Tensor, w: Tensor) -> Tensor:
    """As DeepSeek-V3 has them."""
    return linear(x.view(-1, WIDTH).type(torch.float32), w.type(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_widened_is_read_as_it_is(rows: int, dtype: torch.dtype) -> None:
    x, (w,) = stream(rows, dtype), weights(12, dtype=dtype)
    module = fused(logits, x, w)
    (call,) = calls(module)
    assert rest(module) == {"view"}
    assert (arguments(call)["wide"], str(arguments(call)["weights"][0])) == (True, "w")
    wide = x.double().view(-1, WIDTH) @ w.double().T
    assert module(x, w).dtype == torch.float32
    assert error(module(x, w), wide) < 1e-6


def test_it_is_apart_from_what_is_not_widened() -> None:
    def function(x: Tensor, w: Tensor, a: Tensor) -> Any:
        return linear(x.type(torch.float32), w.type(torch.float32)), linear(x, a)

    module = fused(function, stream(dtype=HALF), *weights(12, 8, dtype=HALF))
    assert [arguments(call)["wide"] for call in calls(module)] == [True, False]


NOT_WIDENED: dict[str, Function] = {
    "the weight alone": lambda x, w: linear(x.sum().float() + x.tanh().float(), w.float()),
    "of another dtype": lambda x, w: linear(x.to(torch.float16).float(), w.float()),
    "with a bias": lambda x, w: linear(x.float(), w.float(), w.float()[:, 0]),
    "in float64": lambda x, w: linear(x.double(), w.double()),
}


@pytest.mark.parametrize("name", NOT_WIDENED)
def test_what_is_widened_otherwise_stays(name: str) -> None:
    given = stream(dtype=HALF), *weights(12, dtype=HALF)
    assert calls(fused(NOT_WIDENED[name], *given)) == []


# The operators ----------------------------------------------------------------------------------


def wide_norm(x: Tensor, weight: Tensor, shift: Tensor | None) -> Tensor:
    wide = x.double() - x.double().mean(-1, keepdim=True)
    normed = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    return normed if shift is None else normed + shift.double()


#: Written out: torch's own are what the operator calls.
WIDE: dict[str, Function] = {
    "": lambda y: y,
    "silu": lambda y: y / (1 + (-y).exp()),
    "gelu": lambda y: y * (1 + torch.special.erf(y / math.sqrt(2))) / 2,
    "gelu_tanh": lambda y: y * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh()) / 2,
    "relu": lambda y: y.clamp_min(0),
    "relu_squared": lambda y: y.clamp_min(0) ** 2,
}


@given(
    st.sampled_from(DTYPES),
    st.sampled_from(list(ACTIVATIONS)),
    *(st.booleans() for _ in range(4)),
)
def test_projections_against_float64(
    dtype: torch.dtype, name: str, two: bool, shifted: bool, biased: bool, added: bool
) -> None:
    x, n = stream(1, dtype) + 2, scale(dtype)
    shift = biases(WIDTH, dtype=dtype)[0] if shifted else None
    given = weights(9, 9, dtype=dtype)[: 2 if two and name else 1]
    offsets = biases(9, 9, dtype=dtype)[: len(given)] if biased else []
    residual = random(1, 1, 9, dtype=dtype) if added else None
    factors = [0.3, 2.0][: len(given)]
    ys = [wide_norm(x, n, shift) @ w.double().T * f for w, f in zip(given, factors, strict=True)]
    ys = [y + b.double() for y, b in zip(ys, offsets, strict=True)] if offsets else ys
    want = WIDE[name](ys[0]) * (ys[1] if len(ys) > 1 else 1)
    want = want if residual is None else want + residual.double()
    more = name, residual, 0.0, shift, True, factors
    (got,) = project(x, given, offsets, n, EPS, *more)
    assert error(got, want) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_layer_norms_against_float64(shifted: bool, dtype: torch.dtype) -> None:
    x, weight = stream(5, dtype) + 2, scale(dtype)
    shift = biases(WIDTH, dtype=dtype)[0] if shifted else None
    got = normalize(x, weight, EPS, 0.0, shift, True)
    assert got.dtype == dtype
    assert error(got, wide_norm(x, weight, shift)) < TOLERANCE[dtype]
    assert error(normalize(x, weight, EPS, 0.0, shift, False), wide_norm(x, weight, shift)) > 0.1


def test_they_are_proper_operators() -> None:
    x, n, s, (a, b) = stream(1), scale(), biases(WIDTH)[0], weights(9, 9)
    torch.library.opcheck(NORMALIZE, (x, n, EPS, 0.0, s, True))
    for name in ACTIVATIONS:
        for some in ([a], [a, b]):
            residual = random(1, 1, 9) if name or len(some) == 1 else None
            more = (name, residual, 0.0, s, True, [2.0] * len(some), name == "silu")
            torch.library.opcheck(PROJECT, (x, some, [], n, EPS, *more))
