"""Convolutions of a few tokens and products by one vector are written out, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from adaskip_passes.decode import write_out_products
from adaskip_passes.decode.write_out_products import MOST_OUTPUTS, MOST_TAPS, WriteOutProducts

_LEFT = "conv1d", "bmm", "matmul"


def passed(function: Callable[..., Any], *inputs: Tensor) -> tuple[fx.GraphModule, int]:
    """The traced function after the pass, and how many changes that says it made."""
    traced = fx.symbolic_trace(function)
    values = _Values(traced)
    values.run(*(x.clone() for x in inputs))
    result = WriteOutProducts()(traced)
    traced.graph.lint()
    traced.recompile()
    return traced, result.changes


class _Values(fx.Interpreter):
    """Leaves its value at each node."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = value = super().run_node(n)
        return value


def left(module: fx.GraphModule) -> int:
    """How many convolutions and products are calls of libraries still."""
    return sum(getattr(n.target, "__name__", n.target) in _LEFT for n in module.graph.nodes)


def updating(channels: int, taps: int, tokens: int) -> Callable[..., Tensor]:
    """A mixer's convolution of more tokens, as transformers writes it."""

    def update(state: Tensor, new: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        both = torch.cat([state, new], dim=-1).to(weight.dtype)
        state.copy_(both[:, :, -taps:])
        wide = weight.unsqueeze(1)
        out = nn.functional.conv1d(both, wide, bias, padding=0, groups=channels)
        return nn.functional.silu(out[:, :, -tokens:])

    return update


def by_hand(state: Tensor, new: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What that gives, and the state after it, in float64."""
    state, new, weight, bias = (t.double() for t in (state, new, weight, bias))
    rows, channels, taps = state.shape
    out = torch.zeros(rows, channels, new.shape[-1], dtype=torch.float64)
    both = torch.cat([state, new], dim=-1)
    for i in range(rows):
        for j in range(channels):
            for token in range(new.shape[-1]):
                seen = both[i, j, token + 1 : token + 1 + taps]
                out[i, j, token] = (seen * weight[j]).sum() + bias[j]
    return out * out.sigmoid(), both[:, :, -taps:]


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(2, MOST_TAPS),
    st.integers(1, MOST_OUTPUTS - 1),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_convolution_is_the_same(
    rows: int, channels: int, taps: int, tokens: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(taps)
    state, new = torch.randn(rows, channels, taps), torch.randn(rows, channels, tokens)
    weight, bias = torch.randn(channels, taps), torch.randn(channels)
    inputs = [t.to(dtype) for t in (state, new, weight, bias)]
    want, kept = by_hand(*inputs)
    module, changes = passed(updating(channels, taps, tokens), *inputs)
    assert changes >= 1
    assert left(module) == 0
    got = module(*inputs)
    assert got.dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(got.double(), want, rtol=close, atol=close)
    assert torch.equal(inputs[0].double(), kept), "the state has the last tokens"


@pytest.mark.breaks
def test_another_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: of what a step reads one token too many is taken for the last one."""
    monkeypatch.setattr(write_out_products, "_last_outputs", lambda node: 2)
    inputs = [torch.randn(1, 3, 4), torch.randn(1, 3, 1), torch.randn(3, 4), torch.randn(3)]
    want, _ = by_hand(*inputs)
    module, _ = passed(updating(3, 4, 1), *inputs)
    assert module(*inputs).shape != want.shape


def read(states: Tensor, decay: Tensor, vector: Tensor) -> Tensor:
    """What a step reads of states that decay."""
    return (states * decay) @ vector


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_product_by_a_vector_is_the_same(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    states, decay, vector = (
        torch.randn(shape).to(dtype)
        for shape in ((2, rows, 3, size), (2, rows, 1, 1), (2, rows, size, 1))
    )
    module, changes = passed(read, states, decay, vector)
    assert changes >= 1
    assert left(module) == 0
    want = torch.einsum("abij,abj->abi", (states * decay).double(), vector[..., 0].double())
    got = module(states, decay, vector)
    assert (got.dtype, got.shape) == (dtype, (2, rows, 3, 1))
    close = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(got[..., 0].double(), want, rtol=close, atol=close)


def test_a_product_by_one_vector_for_all_is_the_same() -> None:
    states, vector = torch.randn(2, 3, 4), torch.randn(1, 4, 1)
    module, _ = passed(lambda a, b: (a * 2) @ b, states, vector)
    assert left(module) == 0
    torch.testing.assert_close(module(states, vector), (states * 2) @ vector)


def test_any_number_of_rows() -> None:
    """Nothing of the rewrite depends on how many there are."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = [DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC]
    several = StatelessSymbolicContext(dynamic_sizes=sizes)
    state, new = (
        mode.from_tensor(t, symbolic_context=several)
        for t in (torch.randn(3, 6, 4), torch.randn(3, 6, 1))
    )
    weight, bias = (
        mode.from_tensor(t, static_shapes=True) for t in (torch.randn(6, 4), torch.randn(6))
    )

    def function(state: Tensor, new: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        seen = updating(6, 4, 1)(state, new, weight, bias)
        return torch.bmm(state * 2, seen.transpose(1, 2).expand(-1, 4, 6)[:, :, :1])

    with mode:
        traced = fx.symbolic_trace(function)
        _Values(traced).run(state, new, weight, bias)
        WriteOutProducts()(traced)
    traced.recompile()
    assert left(traced) == 0
    for rows in (1, 2, 5):
        inputs = [torch.randn(shape) for shape in ((rows, 6, 4), (rows, 6, 1), (6, 4), (6,))]
        theirs = copy.deepcopy(inputs)
        torch.testing.assert_close(traced(*inputs), function(*theirs))


def conv(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return nn.functional.conv1d(x, weight, None, groups=options.pop("groups", 4), **options)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, w: conv(x, w, groups=2), [(1, 4, 4), (4, 2, 4)]),
        (lambda x, w: conv(x, w, padding=3), [(1, 4, 4), (4, 1, 4)]),
        (lambda x, w: conv(x, w, padding="same"), [(1, 4, 4), (4, 1, 3)]),
        (lambda x, w: conv(x, w, stride=2), [(1, 4, 6), (4, 1, 4)]),
        (lambda x, w: conv(x, w, dilation=2), [(1, 4, 7), (4, 1, 4)]),
        (lambda x, w: conv(x, w), [(1, 4, MOST_OUTPUTS + 4), (4, 1, 4)]),
        (lambda x, w: conv(x, w), [(1, 4, MOST_TAPS + 1), (4, 1, MOST_TAPS + 1)]),
        (lambda x, w: conv(x, w), [(4, 4), (4, 1, 4)]),
        (lambda a, b: torch.bmm(a, b), [(2, 3, 4), (2, 4, 1)]),
        (lambda a, b: torch.bmm(a * 2, b), [(2, 3, 4), (2, 4, 2)]),
        (lambda a, b: (a * 2) @ b, [(3, 4), (4, 1)]),
    ],
)
def test_others_are_left_alone(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]]
) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    module, changes = passed(function, *inputs)
    assert (changes, left(module)) == (0, 1)
    assert torch.equal(module(*inputs), function(*inputs))


def test_float64_is_left_alone() -> None:
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((1, 3, 4), (1, 3, 1), (3, 4), (3,))]
    module, changes = passed(updating(3, 4, 1), *inputs)
    assert (changes, left(module)) == (0, 1)


def test_what_is_read_is_computed() -> None:
    """All outputs of a convolution, where more is read than the last ones."""
    x, weight = torch.randn(1, 4, 6), torch.randn(4, 1, 4)
    for function in (
        lambda x, w: conv(x, w),
        lambda x, w: conv(x, w)[:, :, -1:] + conv(x, w)[:, :, :1],
        lambda x, w: conv(x, w)[:, :, :2],
        lambda x, w: conv(x, w)[:, 1:, -1:],
        lambda x, w: conv(x, w)[:, :, -9:],
    ):
        module, changes = passed(function, x, weight)
        assert changes
        torch.testing.assert_close(module(x, weight), function(x, weight))


def test_a_step_of_mamba_2_has_neither_kernel() -> None:
    """The functions that transformers has for a step, traced."""
    mamba = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    step = getattr(mamba, "mamba2_selective_state_update", None)
    if step is None:
        pytest.skip("transformers before 5.17 writes it inside of the mixer")
    step = getattr(step, "__wrapped__", step)
    torch.manual_seed(0)
    heads, width, size = 4, 8, 16
    state, x, dt = (
        torch.randn(2, heads, width, size),
        torch.randn(2, heads, width),
        torch.rand(2, heads, width),
    )
    a, b, c, d = (
        -torch.rand(heads, width, size),
        torch.randn(2, 1, size),
        torch.randn(2, 1, size),
        torch.randn(heads, width),
    )

    def function(
        state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
    ) -> Tensor:
        decay = torch.exp(dt.unsqueeze(-1) * a)
        states = state * decay + dt.unsqueeze(-1) * b.unsqueeze(2) * x.unsqueeze(-1)
        state.copy_(states)
        wide = c.unsqueeze(1).expand(2, heads, 1, size).reshape(-1, size, 1)
        return torch.bmm(states.view(-1, width, size), wide).view(2, heads, width) + x * d

    inputs = [state, x, dt, a, b, c, d]
    theirs = copy.deepcopy(inputs)
    module, _ = passed(function, *inputs)
    assert left(module) == 0
    torch.testing.assert_close(module(*inputs), step(*theirs))
    torch.testing.assert_close(inputs[0], theirs[0])
