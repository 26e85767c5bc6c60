"""Projections as one operator: FuseProjections keeps results, and the operators' references."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional
from torch.nn.functional import linear, silu

from adaskip_passes import FuseProjections, capture
from adaskip_passes.analysis.effects import operation
from adaskip_passes.decode.projection_ops import project
from adaskip_passes.linking import precompile
from adaskip_passes.linking.precompile import compile_ahead

PROJECT = torch.ops.adaskip.project.default
NORMALIZE = torch.ops.adaskip.normalize.default
EPS = 1e-5
WIDTH = 16
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Function = Callable[..., Any]


# Graphs before and after -----------------------------------------------------------------------


class Record(fx.Interpreter):
    """Puts on each node what it computes."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["example_value"] = value.clone() if isinstance(value, Tensor) else value
        return value


def copies(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.clone() for t in inputs]


def traced(function: Function, *inputs: Tensor) -> fx.GraphModule:
    module = fx.symbolic_trace(function)
    Record(module).run(*copies(inputs))
    return module


def error(got: Tensor, expected: Tensor) -> float:
    wide = expected.double()
    return float((got.double() - wide).norm() / wide.norm().clamp_min(1e-30))


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def same_results(module: fx.GraphModule, function: Function, *inputs: Tensor) -> None:
    """A graph computes what the function does, and leaves the same in its inputs.

    It is as exact as the narrowest of what it reads.
    """
    known = max(TOLERANCE.get(t.dtype, 0.0) for t in inputs)
    mine, theirs = copies(inputs), copies(inputs)
    got, expected = flat(module(*mine)), flat(function(*theirs))
    for a, b in zip([*got, *mine], [*expected, *theirs], strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert error(a, b) <= max(known, TOLERANCE.get(b.dtype, 0.0))


def fused(function: Function, *inputs: Tensor) -> fx.GraphModule:
    """The graph after the pass; its results and those that its fakes promise are checked."""
    module = traced(function, *inputs)
    FuseProjections()(module)
    module.recompile()
    same_results(module, function, *inputs)
    for node in calls(module):
        args = fx.map_arg(node.args, lambda n: n.meta["example_value"].to("meta"))
        for item in node.users:
            promised, value = PROJECT(*args)[item.args[1]], item.meta["example_value"]
            assert (promised.shape, promised.dtype) == (value.shape, value.dtype)
    return module


def calls(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.find_nodes(op="call_function", target=PROJECT))


def rest(module: fx.GraphModule) -> set[str]:
    """What a graph does besides projecting."""
    kept = [n for n in module.graph.nodes if n.op in ("call_function", "call_method")]
    return {operation(n) for n in kept if n.target is not PROJECT} - {"getitem", "getattr"}


def untouched(function: Function, *inputs: Tensor) -> bool:
    before = str(traced(function, *inputs).graph)
    return str(fused(function, *inputs).graph) == before


def arguments(call: fx.Node) -> dict[str, Any]:
    names = (
        *("x", "weights", "biases", "norm", "eps", "activation", "residual", "offset"),
        *("shift", "centered", "factors", "wide"),
    )
    return dict(zip(names, call.args, strict=True))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=source).to(dtype)


def stream(rows: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(rows, 1, WIDTH, dtype=dtype, seed=1)


def weights(*outs: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(n, WIDTH, dtype=dtype, seed=i + 2) / 4 for i, n in enumerate(outs)]


def biases(*outs: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(n, dtype=dtype, seed=i + 9) for i, n in enumerate(outs)]


def scale(dtype: torch.dtype = torch.float32) -> Tensor:
    return 1 + random(WIDTH, dtype=dtype, seed=20) / 4


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers writes it."""
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + EPS)
    return weight * h.to(x.dtype)


def test_a_wrong_weight_is_noticed() -> None:
    """The companion of every comparison here."""
    x, (w, other) = stream(), weights(8, 8)
    with pytest.raises(AssertionError):
        same_results(traced(lambda x, w: linear(x, w), x, w), lambda x, w: linear(x, other), x, w)
    other = w.clone()
    other[3] *= 1.01
    with pytest.raises(AssertionError):
        same_results(traced(lambda x, w: linear(x, w), x, w), lambda x, w: linear(x, other), x, w)


# Several projections of one input --------------------------------------------------------------


def qkv(x: Tensor, n: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    h = rms_norm(x, n)
    return linear(h, q), linear(h, k), linear(h, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_and_three_projections_become_one_call(dtype: torch.dtype) -> None:
    module = fused(qkv, stream(dtype=dtype), scale(dtype), *weights(12, 8, 8, dtype=dtype))
    (call,) = calls(module)
    assert rest(module) == set()
    got = arguments(call)
    assert [str(got[k]) for k in ("x", "norm")] == ["x", "n"]
    assert [str(w) for w in got["weights"]] == ["q", "k", "v"]
    assert (got["biases"], got["eps"], got["activation"]) == ([], EPS, "")
    assert got["residual"] is None


def test_biases_go_along() -> None:
    def function(x: Tensor, n: Tensor, q: Tensor, k: Tensor, b: Tensor, c: Tensor) -> Any:
        h = rms_norm(x, n)
        return linear(h, q, b), linear(h, k, bias=c)

    module = fused(function, stream(), scale(), *weights(12, 8), *biases(12, 8))
    (call,) = calls(module)
    assert [str(b) for b in arguments(call)["biases"]] == ["b", "c"]
    assert rest(module) == set()


def test_projections_with_and_without_a_bias_are_grouped_apart() -> None:
    def function(x: Tensor, q: Tensor, k: Tensor, v: Tensor, b: Tensor, c: Tensor) -> Any:
        return linear(x, q, b), linear(x, k), linear(x, v, c)

    module = fused(function, stream(), *weights(12, 8, 8), *biases(12, 8))
    with_bias, without = (arguments(c) for c in calls(module))
    assert [str(w) for w in with_bias["weights"]] == ["q", "v"]
    assert [str(b) for b in with_bias["biases"]] == ["b", "c"]
    assert ([str(w) for w in without["weights"]], without["biases"]) == (["k"], [])


def test_a_fourth_projection_is_another_call() -> None:
    def function(x: Tensor, n: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
        h = rms_norm(x, n)
        return tuple(linear(h, w) for w in (a, b, c, d))

    module = fused(function, stream(), scale(), *weights(12, 8, 8, 4))
    assert [len(arguments(c)["weights"]) for c in calls(module)] == [3, 1]
    assert [str(arguments(c)["norm"]) for c in calls(module)] == ["n", "n"]
    assert rest(module) == set()


def test_projections_of_different_inputs_are_different_calls() -> None:
    def function(x: Tensor, y: Tensor, q: Tensor, k: Tensor) -> Any:
        return linear(x, q), linear(y, k)

    module = fused(function, stream(), stream() + 1, *weights(8, 8))
    assert [str(arguments(c)["x"]) for c in calls(module)] == ["x", "y"]


def test_a_slice_that_takes_everything_is_seen_through() -> None:
    def head(x: Tensor, n: Tensor, w: Tensor) -> Tensor:
        return linear(rms_norm(x, n)[:, -1:, :], w)

    module = fused(head, stream(), scale(), *weights(12))
    (call,) = calls(module)
    assert str(arguments(call)["x"]) == "x"
    assert rest(module) == set()


def test_a_slice_that_takes_a_part_is_not_seen_through() -> None:
    def head(x: Tensor, n: Tensor, w: Tensor) -> Tensor:
        return linear(rms_norm(x, n)[:, -1:, :], w)

    module = fused(head, random(1, 3, WIDTH), scale(), *weights(12))
    (call,) = calls(module)
    assert operation(arguments(call)["x"]) == "getitem"
    assert arguments(call)["norm"] is None


def test_an_index_is_not_a_slice() -> None:
    """The same shape, but from other places."""

    def function(x: Tensor, at: Tensor, w: Tensor) -> Tensor:
        return linear(x[at], w)

    x, at = random(2, WIDTH).to(torch.bfloat16), torch.tensor([1, 0])
    (call,) = calls(fused(function, x, at, *weights(8, dtype=torch.bfloat16)))
    assert operation(arguments(call)["x"]) == "getitem"


# Gates -----------------------------------------------------------------------------------------


GATES: Mapping[str, Function] = {
    "silu first": lambda g, u: silu(g) * u,
    "silu second": lambda g, u: u * silu(g),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_becomes_part_of_the_call(name: str, gate_first: bool, dtype: torch.dtype) -> None:
    def function(x: Tensor, n: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        h = rms_norm(x, n)
        if gate_first:
            g, u = linear(h, gate), linear(h, up)
        else:
            u, g = linear(h, up), linear(h, gate)
        return GATES[name](g, u)

    module = fused(function, stream(dtype=dtype), scale(dtype), *weights(12, 12, dtype=dtype))
    (call,) = calls(module)
    assert rest(module) == set()
    assert arguments(call)["activation"] == "silu"
    assert [str(w) for w in arguments(call)["weights"]] == ["gate", "up"]


def test_biases_of_a_gate_keep_to_their_weights() -> None:
    def function(x: Tensor, gate: Tensor, up: Tensor, b: Tensor, c: Tensor) -> Tensor:
        u, g = linear(x, up, c), linear(x, gate, b)
        return silu(g) * u

    module = fused(function, stream(), *weights(12, 12), *biases(12, 12))
    (call,) = calls(module)
    assert [str(b) for b in arguments(call)["biases"]] == ["b", "c"]
    assert arguments(call)["activation"] == "silu"


NOT_GATES: Mapping[str, Function] = {
    "silu is read twice": lambda g, u: (silu(g) * u, silu(g) + 1),
    "silu's result is read twice": lambda g, u: (lambda s: (s * u, s + 1))(silu(g)),
    "the gate is read elsewhere": lambda g, u: (silu(g) * u, g + 1),
    "up is read elsewhere": lambda g, u: (silu(g) * u, u + 1),
    "up twice": lambda g, u: silu(g) * u * u,
    "silu of both": lambda g, u: silu(g) * silu(u),
    "silu of silu": lambda g, u: silu(silu(g)) * u,
    "squared": lambda g, u: silu(g) * silu(g) + u,
    "a sum": lambda g, u: silu(g) + u,
    "silu in place": lambda g, u: silu(g).mul_(2) * u,
    "multiplied in place": lambda g, u: silu(g).mul_(u),
    "up in place": lambda g, u: silu(g) * u.mul_(2),
}


@pytest.mark.parametrize("name", NOT_GATES)
def test_what_is_not_quite_a_gate_stays_beside(name: str) -> None:
    def function(x: Tensor, gate: Tensor, up: Tensor) -> Any:
        g, u = linear(x, gate), linear(x, up)
        return NOT_GATES[name](g, u)

    (call,) = calls(fused(function, stream(), *weights(12, 12)))
    assert arguments(call)["activation"] == ""
    assert len(arguments(call)["weights"]) == 2


def test_silu_in_place_is_right() -> None:
    def function(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return silu(linear(x, gate), inplace=True) * linear(x, up)

    fused(function, stream(), *weights(12, 12))


def test_a_third_projection_is_one_of_its_own() -> None:
    def function(x: Tensor, gate: Tensor, up: Tensor, more: Tensor) -> Any:
        return silu(linear(x, gate)) * linear(x, up), linear(x, more)

    module = fused(function, stream(), *weights(12, 12, 8))
    assert rest(module) == set()
    assert [arguments(call)["activation"] for call in calls(module)] == ["silu", ""]


# Residual adds ---------------------------------------------------------------------------------


ADDS: Mapping[str, Function] = {
    "stream first": lambda h, y: h + y,
    "branch first": lambda h, y: y + h,
    "torch.add": lambda h, y: torch.add(h, y),
    "method": lambda h, y: h.add(y),
}


@pytest.mark.parametrize("name", ADDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_add_is_absorbed(name: str, dtype: torch.dtype) -> None:
    def function(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return ADDS[name](h, linear(x, w))

    h, x = stream(dtype=dtype) * 2, stream(dtype=dtype)
    module = fused(function, h, x, *weights(WIDTH, dtype=dtype))
    (call,) = calls(module)
    assert rest(module) == set()
    assert str(arguments(call)["residual"]) == "h"


NOT_RESIDUALS: Mapping[str, Function] = {
    "alpha": lambda h, y: torch.add(h, y, alpha=2),
    "a number": lambda h, y: y + 1,
    "itself": lambda h, y: y + y,
    "the projection is read elsewhere": lambda h, y: (h + y, y * 2),
    "a difference": lambda h, y: h - y,
    "broadcast": lambda h, y: h[..., :1] + y,
    "more rows": lambda h, y: h.expand(3, 1, WIDTH) + y,
    "another dtype": lambda h, y: h.to(torch.bfloat16) + y,
    "the stream is written": lambda h, y: h.add_(y),
    "the branch is written": lambda h, y: y.add_(h),
    "the stream is written later": lambda h, y: (h + y, h.mul_(2)),
}


@pytest.mark.parametrize("name", NOT_RESIDUALS)
def test_what_is_not_quite_a_residual_stays_beside(name: str) -> None:
    def function(h: Tensor, x: Tensor, w: Tensor) -> Any:
        return NOT_RESIDUALS[name](h, linear(x, w))

    (call,) = calls(fused(function, stream() * 2, stream(), *weights(WIDTH)))
    assert arguments(call)["residual"] is None


def test_a_gate_is_one_of_more_projections() -> None:
    """As in Qwen2-MoE: beside it there are a router, which reads a view, and another gate."""

    def function(x: Tensor, router: Tensor, gate: Tensor, up: Tensor, other: Tensor) -> Any:
        scores = linear(x.reshape(-1, 1, WIDTH), router)
        return scores, silu(linear(x, gate)) * linear(x, up), torch.sigmoid(linear(x, other))

    module = fused(function, stream(), *weights(4, 8, 8, 1))
    assert rest(module) == {"sigmoid"}
    found = [arguments(call) for call in calls(module)]
    assert sorted((len(got["weights"]), got["activation"]) for got in found) == [
        (2, ""),
        (2, "silu"),
    ]
    assert {str(got["x"]) for got in found} == {"x"}


def test_a_residual_computed_after_the_projection_is_there_in_time() -> None:
    def function(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
        y = linear(x, w)
        return y + torch.tanh(h)

    (call,) = calls(fused(function, stream(), stream(), *weights(WIDTH)))
    assert operation(arguments(call)["residual"]) == "tanh"


def test_blocks_in_a_row() -> None:
    """Attention's output projection and an FFN: the result of one call is the next one's input."""

    def function(h: Tensor, a: Tensor, n: Tensor, o: Tensor, g: Tensor, u: Tensor) -> Tensor:
        h = h + linear(a, o)
        normed = rms_norm(h, n)
        return h + linear(silu(linear(normed, g)) * linear(normed, u), o)

    module = fused(function, stream(), stream(), scale(), *weights(WIDTH, WIDTH, WIDTH))
    assert [arguments(c)["activation"] for c in calls(module)] == ["", "silu", ""]
    assert [arguments(c)["residual"] is None for c in calls(module)] == [False, True, False]
    assert rest(module) == set()


# Norms -----------------------------------------------------------------------------------------


def variant(
    power: float = 2, dim: int = -1, keepdim: bool = True, reduce: str = "mean"
) -> Callable[[Tensor, Tensor], Tensor]:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        h = x.to(torch.float32)
        moment = getattr(h.pow(power), reduce)(dim, keepdim=keepdim)
        return weight * (h * torch.rsqrt(moment + EPS))

    return norm


def of_another(x: Tensor, weight: Tensor) -> Tensor:
    """The variance is not that of what it divides."""
    h, other = x.to(torch.float32), torch.tanh(x).to(torch.float32)
    return weight * (h * torch.rsqrt(other.pow(2).mean(-1, keepdim=True) + EPS))


NOT_NORMS: Mapping[str, Function] = {
    "pow 3": variant(power=3),
    "no keepdim": variant(keepdim=False),
    "another dim": variant(dim=0),
    "a sum": variant(reduce="sum"),
    "of another": of_another,
    "no weight": lambda x, w: variant()(x, torch.tanh(w)),
}

NORMS: Mapping[str, Function] = {
    "transformers": rms_norm,
    "no cast back": variant(),
    "weight last": lambda x, w: variant()(x, torch.tensor(1.0)) * w,
    "float": lambda x, w: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + EPS)),
    "factor first": lambda x, w: (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * x) * w,
}


@pytest.mark.parametrize("name", ["transformers", "no cast back", "factor first"])
def test_a_norm_becomes_part_of_the_call(name: str) -> None:
    def function(x: Tensor, n: Tensor, w: Tensor) -> Tensor:
        return linear(NORMS[name](x, n), w)

    module = fused(function, stream(), scale(), *weights(8))
    (call,) = calls(module)
    assert str(arguments(call)["norm"]) == "n"
    assert rest(module) == set()


@pytest.mark.parametrize("name", ["weight last", "float"])
def test_other_ways_to_write_a_norm_are_right(name: str) -> None:
    def function(x: Tensor, n: Tensor, w: Tensor) -> Tensor:
        return linear(NORMS[name](x, n), w)

    assert len(calls(fused(function, stream(), scale(), *weights(8)))) == 1


@pytest.mark.parametrize("name", NOT_NORMS)
def test_what_is_not_quite_a_norm_stays_beside(name: str) -> None:
    def function(x: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Any:
        h = NOT_NORMS[name](x, n)
        return linear(h, q), linear(h, k)

    positive = stream().abs()  # so is its mean of cubes
    (call,) = calls(fused(function, positive, scale(), *weights(8, 8)))
    assert arguments(call)["norm"] is None
    assert len(arguments(call)["weights"]) == 2


def test_a_norm_with_one_factor_for_all_stays_beside() -> None:
    def function(x: Tensor, n: Tensor, w: Tensor) -> Tensor:
        return linear(rms_norm(x, n), w)

    (call,) = calls(fused(function, stream(), scale()[:1].clone(), *weights(8)))
    assert arguments(call)["norm"] is None


def test_a_norm_that_is_read_by_others_too_stays_for_them() -> None:
    def function(x: Tensor, n: Tensor, w: Tensor) -> Any:
        h = rms_norm(x, n)
        return linear(h, w), h * 2

    module = fused(function, stream(), scale(), *weights(8))
    assert len(calls(module)) == 1
    assert {"rsqrt", "pow", "mean"} <= rest(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [2, 16, 32])
def test_the_norm_of_more_rows_is_a_call_of_its_own(rows: int, dtype: torch.dtype) -> None:
    inputs = stream(rows, dtype), scale(dtype), *weights(12, 8, 8, dtype=dtype)
    module = fused(qkv, *inputs)
    (call,) = calls(module)
    assert arguments(call)["norm"] is None
    assert len(arguments(call)["weights"]) == 3
    normed = arguments(call)["x"]
    assert normed.target is NORMALIZE
    assert (*map(str, normed.args[:2]), normed.args[2]) == ("x", "n", EPS)
    assert rest(module) == {operation(normed)}


def test_a_norm_of_several_groups_is_one_call() -> None:
    half = torch.bfloat16

    def four(x: Tensor, n: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
        h = rms_norm(x, n)
        return linear(h, a), linear(h, b), linear(h, c), linear(h, d)

    module = fused(four, stream(3, half), scale(half), *weights(12, 8, 8, 4, dtype=half))
    assert len(calls(module)) == 2
    assert len(module.graph.find_nodes(op="call_function", target=NORMALIZE)) == 1


def test_rows_are_counted_over_all_dimensions() -> None:
    half = torch.bfloat16
    x = random(4, 8, WIDTH, dtype=half)
    assert len(calls(fused(qkv, x, scale(half), *weights(12, 8, 8, dtype=half)))) == 1
    x = random(1, 33, WIDTH, dtype=half)
    assert untouched(qkv, x, scale(half), *weights(12, 8, 8, dtype=half))


@pytest.mark.parametrize(("rows", "dtype"), [(33, torch.bfloat16), (2, torch.float32)], ids=str)
def test_too_many_rows_change_nothing(rows: int, dtype: torch.dtype) -> None:
    assert untouched(qkv, stream(rows, dtype), scale(dtype), *weights(12, 8, 8, dtype=dtype))


def test_another_precision_changes_nothing() -> None:
    x, n, (q, k, v) = stream().double(), scale().double(), (w.double() for w in weights(8, 8, 8))
    module = traced(qkv, x, n, q, k, v)
    before = str(module.graph)
    FuseProjections()(module)
    assert str(module.graph) == before


# What is left alone ----------------------------------------------------------------------------


def test_a_computed_weight_is_left_alone() -> None:
    def function(x: Tensor, w: Tensor, other: Tensor) -> Any:
        return linear(x, w.t()), linear(x, other)

    (w,) = weights(WIDTH)
    (call,) = calls(fused(function, stream(), w, w))
    assert [str(w) for w in arguments(call)["weights"]] == ["other"]
    assert untouched(lambda x, w: linear(x, w.t()), stream(), w)


def test_a_computed_bias_is_left_alone() -> None:
    inputs = stream(), *weights(8), *biases(8)
    assert untouched(lambda x, w, b: linear(x, w, b * 2), *inputs)
    assert len(calls(fused(lambda x, w, b: linear(x, w, b), *inputs))) == 1


def test_a_weight_with_gaps_is_left_alone() -> None:
    (w,) = weights(WIDTH)
    module = traced(lambda x, w: linear(x, w), stream(), w)
    module.graph.find_nodes(op="placeholder")[1].meta["example_value"] = w.t()
    FuseProjections()(module)
    assert calls(module) == []


def test_an_input_without_an_example_is_left_alone() -> None:
    module = fx.symbolic_trace(lambda x, w: linear(x, w))
    FuseProjections()(module)
    assert calls(module) == []


def test_an_input_that_is_written_between_two_projections_is_left_alone() -> None:
    def function(x: Tensor, q: Tensor, k: Tensor) -> Any:
        first = linear(x, q)
        x.mul_(2)
        return first, linear(x, k)

    assert untouched(function, stream(), *weights(8, 8))


def test_an_input_that_is_written_through_a_view_is_left_alone() -> None:
    def function(x: Tensor, q: Tensor, k: Tensor) -> Any:
        first = linear(x, q)
        x[:, :, 2:].mul_(2)
        return first, linear(x, k)

    assert untouched(function, stream(), *weights(8, 8))


def test_a_norm_whose_input_is_written_stays_where_it_is() -> None:
    def function(x: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Any:
        h = rms_norm(x, n)
        x.mul_(2)
        return linear(h, q), linear(h, k)

    (call,) = calls(fused(function, stream(), scale(), *weights(8, 8)))
    assert arguments(call)["norm"] is None


def test_results_that_are_written_are_ones_own() -> None:
    def function(x: Tensor, q: Tensor, k: Tensor) -> Any:
        a, b = linear(x, q), linear(x, k)
        a.mul_(2)
        return a, b

    assert len(calls(fused(function, stream(), *weights(8, 8)))) == 1


# Any block -------------------------------------------------------------------------------------


@given(st.data())
def test_any_block_keeps_its_results(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    rows = data.draw(st.sampled_from([1, 1, 2, 32, 33]), "rows")
    count = data.draw(st.integers(1, 4), "projections")
    bias = data.draw(st.lists(st.booleans(), min_size=count, max_size=count), "bias")
    norm, read = data.draw(st.booleans(), "norm"), data.draw(st.booleans(), "norm is read")
    gate = data.draw(st.sampled_from([None, *GATES, *NOT_GATES]), "gate") if count > 1 else None
    join = data.draw(st.sampled_from([None, *ADDS, *NOT_RESIDUALS]), "residual")
    if rows > 1 and join == "more rows":
        join = None

    def function(
        h: Tensor, x: Tensor, n: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, b: Tensor
    ) -> Any:
        y = rms_norm(x, n) if norm else x
        chosen = zip((w0, w1, w2, w3), bias, strict=False)
        outs = [linear(y, w, b if has_bias else None) for w, has_bias in chosen]
        more = [y * 2] if read else []
        if gate is not None:
            made = (GATES | NOT_GATES)[gate](*outs[:2])
            outs = [*flat(made), *outs[2:]]
        if join is not None:
            made = (ADDS | NOT_RESIDUALS)[join](h, outs[-1])
            outs = [*outs[:-1], *flat(made)]
        return (*outs, *more)

    parameters = [*weights(*[WIDTH] * 4, dtype=dtype), *biases(WIDTH, dtype=dtype)]
    h, x = stream(rows, dtype) * 2, stream(rows, dtype)
    module = fused(function, h, x, scale(dtype), *parameters)
    small = rows == 1 or (rows <= 32 and dtype != torch.float32)
    assert bool(calls(module)) == small
    once = str(module.graph)
    FuseProjections()(module)
    assert str(module.graph) == once


def test_a_second_time_changes_nothing() -> None:
    module = fused(qkv, stream(), scale(), *weights(12, 8, 8))
    once = str(module.graph)
    FuseProjections()(module)
    assert str(module.graph) == once


# The operators ---------------------------------------------------------------------------------


def by_hand(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    norm: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
) -> list[Tensor]:
    """`project`, written out in float64."""
    wide = x.double()
    if norm is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    outs = [torch.einsum("...k,nk->...n", wide, w.double()) for w in weights]
    if biases:
        outs = [y + b.double() for y, b in zip(outs, biases, strict=True)]
    if activation:
        outs = [outs[0] / (1 + torch.exp(-outs[0])) * outs[1]]
    return outs if residual is None else [outs[0] + residual.double()]


def project_arguments(
    dtype: torch.dtype, rows: int, norm: bool, bias: bool, form: str
) -> tuple[Any, ...]:
    outs = {"plain": (12, 8, 4), "silu": (12, 12), "residual": (12,)}[form]
    return (
        stream(rows, dtype),
        weights(*outs, dtype=dtype),
        biases(*outs, dtype=dtype) if bias else [],
        scale(dtype) if norm else None,
        EPS,
        "silu" if form == "silu" else "",
        random(rows, 1, 12, dtype=dtype, seed=5) if form == "residual" else None,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("form", ["plain", "silu", "residual"])
@pytest.mark.parametrize(("norm", "bias"), [(True, False), (False, True), (True, True)])
def test_project_computes_what_it_says(
    dtype: torch.dtype, rows: int, norm: bool, bias: bool, form: str
) -> None:
    args = project_arguments(dtype, rows, norm, bias, form)
    got, expected = project(*args), by_hand(*args)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        assert error(one, other) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_a_norm_reads_and_what_is_added_may_be_wider(dtype: torch.dtype, rows: int) -> None:
    x, *rest, residual = project_arguments(dtype, rows, True, False, "residual")
    x, residual = stream(rows, torch.float32), random(rows, 1, 12, dtype=torch.float32, seed=5)
    args = (x, *rest, residual)
    (got,), (expected,) = project(*args), by_hand(*args)
    assert got.dtype == torch.float32
    assert error(got, expected) < TOLERANCE[dtype]
    (narrow,) = project(x, *rest, None)
    assert narrow.dtype == dtype
    assert NORMALIZE(x, rest[2], EPS).dtype == dtype
    torch.library.opcheck(PROJECT, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize_computes_what_it_says(dtype: torch.dtype) -> None:
    x, weight = stream(3, dtype), scale(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert error(NORMALIZE(x, weight, EPS), expected) < TOLERANCE[dtype]
    assert error(NORMALIZE(x, weight, 0.1), expected) > 1e-2
    torch.library.opcheck(NORMALIZE, (x, weight, EPS))


@pytest.mark.parametrize("change", ["norm", "eps", "activation", "residual", "biases"])
def test_every_argument_of_project_counts(change: str) -> None:
    """The companion."""
    form = change if change == "residual" else "silu"
    args = project_arguments(torch.float32, 1, True, True, form)
    at = ["x", "weights", "biases", "norm", "eps", "activation", "residual"].index(change)
    other = {"biases": [], "eps": 1e-2, "activation": ""}.get(change)
    without = (*args[:at], other, *args[at + 1 :])
    assert error(project(*args)[0], by_hand(*without)[0]) > 1e-3
    assert error(project(*without)[0], by_hand(*without)[0]) < 1e-6


@pytest.mark.parametrize("form", ["plain", "silu", "residual"])
@pytest.mark.parametrize("both", [True, False])
def test_project_is_a_proper_operator(form: str, both: bool) -> None:
    torch.library.opcheck(PROJECT, project_arguments(torch.bfloat16, 2, both, both, form))


# Known gaps ------------------------------------------------------------------------------------


def named_linear(linear: Tensor, w: Tensor) -> Tensor:
    return functional.linear(linear, w)


def named_getitem(getitem: Tensor, w: Tensor) -> Tensor:
    return linear(getitem, w)


def weight_by_name(x: Tensor, w: Tensor) -> Tensor:
    return linear(x, weight=w)


def broadcast_gate(x: Tensor, w: Tensor, gate: Tensor) -> Tensor:
    return silu(linear(x, gate)) * linear(x, w)


def weight_written(x: Tensor, w: Tensor, other: Tensor) -> Any:
    """Between two projections."""
    first = linear(x, other)
    w.mul_(2)
    return first, linear(x, w)


def norm_weight_written(x: Tensor, w: Tensor, n: Tensor) -> Tensor:
    h = rms_norm(x, n)
    n.mul_(2)
    return linear(h, w)


def norm_written_inside(x: Tensor, w: Tensor, n: Tensor) -> Tensor:
    h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    h.mul_(2)
    return linear(n * h, w)


def stream_written_after_its_add(x: Tensor, w: Tensor, n: Tensor, o: Tensor) -> Any:
    """The add is absorbed; the norm after it then reads what is written."""
    h = x + linear(x, o)
    normed = rms_norm(h, n)
    h.add_(1)
    return h, linear(normed, w)


def eps_with_alpha(x: Tensor, w: Tensor, n: Tensor) -> Tensor:
    variance = torch.add(x.pow(2).mean(-1, keepdim=True), 0.1, alpha=3)
    return linear(n * (x * torch.rsqrt(variance)), w)


_X, (_W, _GATE), _OUT = stream(), weights(8, 1), weights(WIDTH)[0]

TRAPS: Mapping[str, tuple[Function, tuple[Tensor, ...]]] = {
    "an input called linear": (named_linear, (_X, _W)),
    "an input called getitem": (named_getitem, (_X, _W)),
    "a weight by name": (weight_by_name, (_X, _W)),
    "a gate of one output": (broadcast_gate, (_X, _W, _GATE)),
    "a weight of one dimension": (lambda x, n: linear(x, n), (_X, scale())),
    "a weight that is written": (weight_written, (_X, _W, _W + 1)),
    "a norm's weight that is written": (norm_weight_written, (_X, _W, scale())),
    "a norm that is written inside": (norm_written_inside, (_X, _W, scale())),
    "a stream that is written": (stream_written_after_its_add, (_X, _W, scale(), _OUT)),
    "eps with alpha": (eps_with_alpha, (_X, _W, scale())),
}


@pytest.mark.parametrize("name", TRAPS)
def test_what_the_pass_must_look_at(name: str) -> None:
    function, inputs = TRAPS[name]
    fused(function, *inputs)


def test_what_those_are_near_to() -> None:
    """The companion: the same with another name, order or form is right."""
    fused(lambda x, w: linear(x, w), _X, _W)
    fused(broadcast_gate, _X, _W, _W + 1)
    fused(lambda x, w, n: linear(rms_norm(x, n), w), _X, _W, scale())


def test_nothing_is_compiled_ahead_without_a_gpu() -> None:
    class Call(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Any:
            return torch.ops.adaskip.project.default(x, [weight], [], None, 0.0, "", None)

    traced = fx.symbolic_trace(Call())
    for node in traced.graph.find_nodes(op="placeholder"):
        node.meta["example_value"] = torch.ones(1, 8)
    assert compile_ahead(traced) == []


@pytest.mark.parametrize("quantized", [False, True])
def test_weights_of_a_class_of_their_own_are_left(quantized: bool) -> None:
    """They look like bfloat16 [out, in], and what is stored is something else."""
    quantization = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Linear(WIDTH, 2 * WIDTH, bias=False).bfloat16()
    if quantized:
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    module = fx.symbolic_trace(lambda x, weight: linear(x, weight))
    x = torch.ones(1, 1, WIDTH, dtype=torch.bfloat16)
    values = iter((x, layer.weight, layer(x)))
    for node in module.graph.nodes:
        if node.op != "output":
            node.meta["example_value"] = next(values)
    assert FuseProjections()(module).changes == (0 if quantized else 2)


@pytest.mark.parametrize("turned", [False, True])
def test_dropout_that_drops_nothing_is_seen_through(turned: bool) -> None:
    """As Phi-3 has it before its adds."""

    def function(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        branch = functional.dropout(linear(x, w), 0.5, False)
        return branch + r if turned else r + branch

    module = fused(function, stream(), random(1, 1, 8), *weights(8))
    (call,) = calls(module)
    assert str(arguments(call)["residual"]) == "r"
    assert rest(module) == set()


def test_dropout_that_drops_stays() -> None:
    module = traced(
        lambda x, r, w: r + functional.dropout(linear(x, w), 1.0, True),
        stream(),
        random(1, 1, 8),
        *weights(8),
    )
    FuseProjections()(module)
    (call,) = calls(module)
    assert arguments(call)["residual"] is None
    assert rest(module) == {"dropout", "add"}


# Rows that are a symbol ------------------------------------------------------------------------


def gated_block(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    wide = x.float()
    hidden = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return x + linear(silu(linear(hidden, gate)) * linear(hidden, up), down)


def of_symbol(least: int, most: int) -> tuple[fx.GraphModule, list[Tensor]]:
    """The block, lowered, with rows between two numbers; and its weights."""
    draw = torch.Generator().manual_seed(0)
    shapes = (WIDTH,), (2 * WIDTH, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)
    weights = [torch.randn(s, generator=draw).to(torch.bfloat16) / WIDTH**0.5 for s in shapes]
    x = torch.zeros(least + 1, 1, WIDTH, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0, min=least, max=most)
    arguments = dict(zip(("x", "norm", "gate", "up", "down"), (x, *weights), strict=True))
    captured = capture(gated_block, arguments, lambda made: made)
    module = captured.graph
    FuseProjections()(module)
    module.recompile()
    with captured.reopened():
        assert not [g for g in captured.shape_guards().conditions if "==" in g]
    return module, weights


@pytest.mark.parametrize(("least", "most"), [(2, 16), (17, 32)])
def test_rows_that_are_a_symbol_are_fused(least: int, most: int) -> None:
    module, weights = of_symbol(least, most)
    assert len(module.graph.find_nodes(op="call_function", target=NORMALIZE)) == 1
    assert len(calls(module)) == 2
    for rows in (least, least + 3, most):
        x = torch.randn(rows, 1, WIDTH, generator=torch.Generator().manual_seed(rows)).bfloat16()
        given = {"x": x, **dict(zip(("norm", "gate", "up", "down"), weights, strict=True))}
        nodes = module.graph.find_nodes(op="placeholder")
        values = [
            rows if isinstance(n.meta["example_value"], torch.SymInt) else given[_argument(n.name)]
            for n in nodes
        ]
        (got,) = module(*values)
        assert error(got, gated_block(**given)) <= TOLERANCE[torch.bfloat16]


def _argument(name: str) -> str:
    return name.strip("_").removeprefix("l_")


@pytest.mark.parametrize("most", [33, 2**31 - 1])
def test_more_rows_than_a_kernel_takes_are_not(most: int) -> None:
    module, _ = of_symbol(2, most)
    assert not calls(module)


@pytest.mark.parametrize(
    ("least", "most", "expected"), [(2, 16, [2, 4, 8, 16]), (17, 32, [32]), (2, 5, [2, 4, 5])]
)
def test_kernels_are_compiled_for_every_power_of_two(
    least: int, most: int, expected: list[int]
) -> None:
    module, _ = of_symbol(least, most)
    node = calls(module)[0]
    values = fx.map_arg(node.args, lambda n: n.meta["example_value"])
    made = list(precompile._of_rows(values))
    assert [x.shape for x, *_ in made] == [(rows, 1, WIDTH) for rows in expected]
    assert all(w.shape == (2 * WIDTH, WIDTH) for _, weights, *_ in made for w in weights)
