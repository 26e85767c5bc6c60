"""The Triton kernels against the same computation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adaskip_passes.decode.ops import EVERY
from adaskip_passes.decode.projection_ops import normalize, project
from tests.support.eager_reference import relative_error

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
#: columns, outputs of each weight, with a norm before it, with biases
SHAPES = (
    (96, (48,), True, False),
    (256, (130, 33, 16), False, True),
    (4096, (1024, 256), True, True),
)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def reference(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    norm: torch.Tensor | None,
    activation: bool,
    residual: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Written out in float64; shares no code with the operator."""
    wide = x.double()
    if norm is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.double()
    outputs = []
    for i, weight in enumerate(weights):
        y = wide @ weight.double().T
        outputs.append(y + biases[i].double() if biases else y)
    if activation:
        outputs = [outputs[0] / (1 + (-outputs[0]).exp()) * outputs[1]]
    if residual is not None:
        outputs = [outputs[0] + residual.double()]
    return outputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 32])
@pytest.mark.parametrize(("width", "outs", "norm", "bias"), SHAPES)
def test_projections(
    dtype: torch.dtype, rows: int, width: int, outs: tuple[int, ...], norm: bool, bias: bool
) -> None:
    if rows > 1 and dtype == torch.float32:
        return  # left to the compiler: see projections.py
    torch.manual_seed(width + rows)
    x = random(rows, 1, width, dtype=dtype)
    weights = [random(n, width, dtype=dtype) / width**0.5 for n in outs]
    biases = [random(n, dtype=dtype) for n in outs] if bias else []
    scale = random(width, dtype=dtype) if norm else None
    got = project(x, weights, biases, scale, 1e-5, "", None)
    for one, expected in zip(got, reference(x, weights, biases, scale, False, None), strict=True):
        assert one.dtype == dtype
        assert relative_error(one.double(), expected) < DTYPES[dtype]
    residual = random(rows, 1, outs[0], dtype=dtype)
    (got_one,) = project(x, weights[:1], biases[:1], scale, 1e-5, "", residual)
    (expected,) = reference(x, weights[:1], biases[:1], scale, False, residual)
    assert relative_error(got_one.double(), expected) < DTYPES[dtype]
    pair = [weights[0], weights[0].flip(0).contiguous()]
    (got_one,) = project(x, pair, biases[:1] * 2, scale, 1e-5, "silu", None)
    (expected,) = reference(x, pair, biases[:1] * 2, scale, True, None)
    assert relative_error(got_one.double(), expected) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_what_a_norm_reads_and_what_is_added_may_be_wider(dtype: torch.dtype, rows: int) -> None:
    """A stream in float32, which is rounded nowhere."""
    x, residual = (random(rows, 1, n, dtype=torch.float32) for n in (320, 96))
    weight, scale = random(96, 320, dtype=dtype) / 18, random(320, dtype=dtype)
    args = x, [weight], [], scale
    (got,) = project(*args, 1e-5, "", residual)
    (expected,) = reference(*args, False, residual)
    assert got.dtype == torch.float32
    assert relative_error(got.double(), expected) < DTYPES[dtype]
    (narrow,) = project(*args, 1e-5, "", None)
    assert narrow.dtype == dtype
    normed, wide = normalize(x, scale, 1e-5), x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale.double()
    assert normed.dtype == dtype
    assert relative_error(normed.double(), expected) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_norms_and_gates_of_gemma(dtype: torch.dtype, rows: int) -> None:
    if rows > 1 and dtype == torch.float32:
        return  # left to the compiler: see projections.py
    x, (a, b) = random(rows, 1, 320, dtype=dtype), random(2, 96, 320, dtype=dtype) / 18
    weight = random(320, dtype=dtype) / 4
    wide = x.double()
    h = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight.double())
    assert relative_error(normalize(x, weight, 1e-5, 1.0).double(), h) < DTYPES[dtype]
    gate, up = h @ a.double().T, h @ b.double().T
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    (got,) = project(x, [a, b], [], weight, 1e-5, "gelu_tanh", None, 1.0)
    assert relative_error(got.double(), expected) < 2 * DTYPES[dtype]
    (wrong,) = project(x, [a, b], [], weight, 1e-5, "silu", None, 1.0)
    assert relative_error(wrong.double(), expected) > 2 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(2, 96), (17, 4096), (8, 5120)])
def test_norms(dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = random(rows, 1, width, dtype=dtype), random(width, dtype=dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert relative_error(normalize(x, weight, 1e-5).double(), expected) < DTYPES[dtype]
    assert relative_error(normalize(x, weight, 0.5).double(), expected) > DTYPES[dtype]


def layer_norm(x: Tensor, weight: Tensor, shift: Tensor | None) -> Tensor:
    """In float64."""
    wide = x.double()
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    return wide if shift is None else wide + shift.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("width", [96, 2560, 4096, 8192, 12288])
def test_layer_norms(width: int, shifted: bool, dtype: torch.dtype) -> None:
    """Of what has a mean, before projections and alone."""
    x, weight = random(5, 1, width, dtype=dtype) + 3, random(width, dtype=dtype)
    shift = random(width, dtype=dtype) if shifted else None
    got = normalize(x, weight, 1e-5, 0.0, shift, True)
    assert relative_error(got.double(), layer_norm(x, weight, shift)) < DTYPES[dtype]
    wrong = normalize(x, weight, 1e-5)
    assert relative_error(wrong.double(), layer_norm(x, weight, shift)) > DTYPES[dtype]
    row = x[:1]
    weights = [random(n, width, dtype=dtype) / width**0.5 for n in (130, 33, 16)]
    h = layer_norm(row, weight, shift)
    got_all = project(row, weights, [], weight, 1e-5, "", None, 0.0, shift, True)
    for one, w in zip(got_all, weights, strict=True):
        assert relative_error(one.double(), h @ w.double().T) < DTYPES[dtype]
    pair = [weights[0], weights[0].flip(0).contiguous()]
    gate, up = (h @ w.double().T for w in pair)
    (got_one,) = project(row, pair, [], weight, 1e-5, "silu", None, 0.0, shift, True)
    expected = torch.nn.functional.silu(gate) * up
    assert relative_error(got_one.double(), expected) < 2 * DTYPES[dtype]


ACTIVATED = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "relu": torch.relu,
    "relu_squared": lambda y: torch.relu(y).square(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("name", ACTIVATED)
def test_activations(name: str, rows: int, dtype: torch.dtype) -> None:
    """Of one weight alone, and of the halves of one as a gate."""
    if rows > 1 and dtype == torch.float32:
        return  # left to the compiler: see projections.py
    x, w = random(rows, 1, 320, dtype=dtype), random(192, 320, dtype=dtype) / 18
    bias = random(192, dtype=dtype)
    y = x.double() @ w.double().T + bias.double()
    (got,) = project(x, [w], [bias], None, 0.0, name, None)
    assert relative_error(got.double(), ACTIVATED[name](y)) < 2 * DTYPES[dtype]
    gate, up = y.chunk(2, -1)
    (got,) = project(x, [*w.chunk(2)], [*bias.chunk(2)], None, 0.0, name, None)
    assert relative_error(got.double(), ACTIVATED[name](gate) * up) < 2 * DTYPES[dtype]
    (wrong,) = project(x, [*w.chunk(2)[::-1]], [*bias.chunk(2)], None, 0.0, name, None)
    assert relative_error(wrong.double(), ACTIVATED[name](gate) * up) > 2 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_factor_before_a_residual(rows: int, dtype: torch.dtype) -> None:
    if rows > 1 and dtype == torch.float32:
        return  # left to the compiler: see projections.py
    x, w = random(rows, 1, 320, dtype=dtype), random(96, 320, dtype=dtype) / 18
    h = random(rows, 1, 96, dtype=dtype)
    for residual, added in ((None, 0.0), (h, h.double())):
        (got,) = project(x, [w], [], None, 0.0, "", residual, 0.0, None, False, [0.22])
        expected = 0.22 * (x.double() @ w.double().T) + added
        assert relative_error(got.double(), expected) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize(("width", "outs"), [(320, 160), (7168, 256)])
def test_results_in_float32(width: int, outs: int, rows: int, dtype: torch.dtype) -> None:
    """Of a router: as if both had been widened before, but for how matrix units add up."""
    x, w = random(rows, width, dtype=dtype), random(outs, width, dtype=dtype) / width**0.5
    around = None, 0.0, "", None, 0.0, None, False, None
    (got,) = project(x, [w], [], *around, True)
    expected = x.double() @ w.double().T
    assert got.dtype == torch.float32
    assert relative_error(got.double(), expected) < 5e-5
    (rounded,) = project(x, [w], [], *around)
    assert rounded.dtype == dtype
    assert relative_error(rounded.double(), expected) > 5e-5


def test_another_weight_is_noticed() -> None:
    """The companion."""
    x, weight = random(1, 256, dtype=torch.bfloat16), random(64, 256, dtype=torch.bfloat16)
    (got,) = project(x, [weight], [], None, 0.0, "", None)
    weight[40] *= 1.5
    (expected,) = reference(x, [weight], [], None, False, None)
    assert relative_error(got.double(), expected) > DTYPES[torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 4])
def test_kernels_compiled_ahead_are_those_that_run(rows: int) -> None:
    """Nothing is left to compile for calls like those in the graph."""
    from adaskip_passes.decode.triton_kernels import combine, decode_attention, projections
    from adaskip_passes.linking.precompile import compile_ahead

    class Calls(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, q: Tensor, kv: Tensor, bounds: Tensor) -> Any:
            y = torch.ops.adaskip.project.default(x, [w, w], [], None, 0.0, "silu", None)
            return y, torch.ops.adaskip.attend.default(q, kv, kv, bounds, 0.125, 0.0, None)

    inputs = (
        random(rows, 1, 320, dtype=torch.bfloat16),
        random(112, 320, dtype=torch.bfloat16),
        random(rows, 4, 1, 32, dtype=torch.bfloat16),
        random(rows, 2, 100, 32, dtype=torch.bfloat16),
        torch.tensor([[[[0, 0, EVERY, 7, 0]]]] * rows, device="cuda"),
    )
    traced = torch.fx.symbolic_trace(Calls())
    with FakeTensorMode() as mode:
        for node, value in zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True):
            node.meta["example_value"] = mode.from_tensor(value)
        begun = compile_ahead(traced)
    assert len(begun) == 3
    for one in begun:
        one.result()
    attention = decode_attention._attend, combine.combine
    kernels = (projections._project_row, projections._project_rows, *attention)
    before = [len(k.device_caches[0][0]) for k in kernels]
    assert sum(before) >= 3
    traced(*inputs)
    assert [len(k.device_caches[0][0]) for k in kernels] == before
    narrow = (inputs[0][..., :304].contiguous(), inputs[1][:, :304].contiguous(), *inputs[2:])
    traced(*narrow)  # the companion: other columns are another kernel
    assert sum(len(k.device_caches[0][0]) for k in kernels) == sum(before) + 1
