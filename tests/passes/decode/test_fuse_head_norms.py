"""Attention normalizes its queries and new keys itself where that is all that was done to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from adaskip_passes.decode.fuse_head_norms import FuseHeadNorms
from adaskip_passes.decode.fuse_rotary import FuseRotary
from adaskip_passes.decode.ops import EVERY, store_and_attend
from tests.passes.decode.test_fuse_projections import Record
from tests.support.eager_reference import relative_error

STORE_AND_ATTEND = torch.ops.adaskip.store_and_attend.default
EPS = 1e-5
#: q [B, T, H, D], k, v, their weights, keys, values, cosines, sines, bounds
Inputs = tuple[Tensor, ...]


def rms(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """As transformers writes it."""
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(variance + eps)
    return weight * wide.to(x.dtype)


def gemmas(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + weight.float())).type_as(x)


def rotated(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return x * c + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * s


def attention(
    of_query: Callable[[Tensor, Tensor], Tensor],
    of_keys: Callable[[Tensor, Tensor], Tensor],
    rotates: bool = True,
) -> Callable[..., Any]:
    def run(
        q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor, key_weight: Tensor, keys: Tensor,
        values: Tensor, c: Tensor, s: Tensor, bounds: Tensor,
    ) -> Any:  # fmt: skip
        heads = of_query(q, query_weight).transpose(1, 2)
        new = of_keys(k, key_weight).transpose(1, 2)
        if rotates:
            heads, new = rotated(heads, c, s), rotated(new, c, s)
        given = heads, keys, values, new, v.transpose(1, 2), None, None, bounds
        return STORE_AND_ATTEND(*given, 0.5, 0.0, None)

    return run


def inputs(rows: int = 2, tokens: int = 3, dim: int = 8) -> Inputs:
    torch.manual_seed(rows + tokens)
    q, k, v = (torch.randn(rows, tokens, heads, dim) for heads in (4, 2, 2))
    keys, values = (torch.randn(rows, 2, 12, dim) for _ in range(2))
    angles = torch.randn(1, 1, tokens, dim)
    bounds = torch.tensor([[[[1, 0, EVERY, 6, 0]]], [[[0, 0, 4, 6, 0]]]])[:rows]
    weights = torch.randn(2, dim)
    return q, k, v, *weights, keys, values, angles.cos(), angles.sin(), bounds


def fused(function: Callable[..., Any], given: Inputs) -> tuple[bool, float]:
    """Whether attention normalizes, and how far results and buffers are from the function's."""
    module = fx.symbolic_trace(function)
    Record(module).run(*[t.clone() for t in given])
    FuseRotary()(module)
    FuseHeadNorms()(module)
    module.graph.lint()
    module.recompile()
    mine, theirs = ([t.clone() for t in given] for _ in range(2))
    got, expected = module(*mine), function(*theirs)
    pairs = [(got, expected), *zip(mine, theirs, strict=True)]
    (call,) = module.graph.find_nodes(op="call_function", target=STORE_AND_ATTEND)
    error = max(relative_error(a.double(), b.double()) for a, b in pairs)
    normalizes = len(call.args) > 13
    assert normalizes != bool([n for n in module.graph.nodes if "rsqrt" in str(n.target)])
    return normalizes, error


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([rms, gemmas]), st.booleans(), st.integers(1, 2), st.integers(1, 5))
def test_norms_become_part_of_attention(
    norm: Callable[..., Tensor], rotates: bool, rows: int, tokens: int
) -> None:
    normalizes, error = fused(attention(norm, norm, rotates), inputs(rows, tokens))
    assert normalizes
    assert error < 1e-6


def other_eps(x: Tensor, weight: Tensor) -> Tensor:
    return rms(x, weight, 2 * EPS)


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, weight.shape, weight, None, EPS)


def of_all_heads(x: Tensor, weight: Tensor) -> Tensor:
    return rms(x.flatten(2), weight.repeat(x.shape[2])).view(x.shape)


def nothing(x: Tensor, weight: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("of_query", "of_keys"),
    [(rms, other_eps), (rms, gemmas), (rms, nothing), (nothing, rms), (of_all_heads, of_all_heads)],
)
def test_other_norms_stay(of_query: Callable[..., Tensor], of_keys: Callable[..., Tensor]) -> None:
    normalizes, error = fused(attention(of_query, of_keys), inputs())
    assert not normalizes
    assert error < 1e-6


def test_layer_norms_stay() -> None:
    module = fx.symbolic_trace(attention(layer_norm, layer_norm, rotates=False))
    Record(module).run(*inputs())
    assert FuseHeadNorms()(module).changes == 0


def test_heads_that_are_read_in_two_parts_stay() -> None:
    normalizes, error = fused(attention(rms, rms, rotates=False), inputs(dim=12))
    assert not normalizes
    assert error < 1e-6


def test_what_is_overwritten_stays() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, w: Tensor, x: Tensor, *rest: Tensor) -> Any:
        keys, values, _, _, bounds = rest
        heads, new = rms(q, w).transpose(1, 2), rms(k, x).transpose(1, 2)
        q.zero_()
        given = heads, keys, values, new, v.transpose(1, 2), None, None, bounds
        return STORE_AND_ATTEND(*given, 0.5, 0.0, None)

    def named(
        q: Tensor, k: Tensor, v: Tensor, w: Tensor, x: Tensor, keys: Tensor, values: Tensor,
        c: Tensor, s: Tensor, bounds: Tensor,
    ) -> Any:  # fmt: skip
        return run(q, k, v, w, x, keys, values, c, s, bounds)

    normalizes, error = fused(named, inputs())
    assert not normalizes
    assert error < 1e-6


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_operator_normalizes_head_by_head(offset: float) -> None:
    """Written out in float64, number by number; with swapped weights it differs (the companion)."""
    q, k, v, query_weight, key_weight, keys, values, c, s, bounds = inputs(2, 3)

    def written_out(x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=torch.float64)
        for row in range(x.shape[0]):
            for head in range(x.shape[1]):
                for token in range(x.shape[2]):
                    numbers = x[row, head, token].double().tolist()
                    root = (sum(n * n for n in numbers) / len(numbers) + EPS) ** 0.5
                    normed = [n / root for n in numbers]
                    out[row, head, token] = torch.tensor(
                        [n * (w + offset) for n, w in zip(normed, weight.tolist(), strict=True)],
                        dtype=torch.float64,
                    )
        return out

    heads, new, own = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    given = keys.clone(), values.clone()
    norms = query_weight, key_weight, EPS, offset
    got = store_and_attend(heads, *given, new, own, c, s, bounds, 0.5, 0.0, None, 0, False, *norms)
    wide = [t.double() for t in (keys, values)]
    normed = written_out(heads, query_weight), written_out(new, key_weight)
    angles = c.double(), s.double()
    turned = [rotated(x, *angles) for x in normed]
    expected = store_and_attend(
        turned[0], *wide, turned[1], own.double(), None, None, bounds, 0.5, 0.0, None
    )
    assert relative_error(got.double(), expected) < 1e-6
    assert relative_error(given[0].double(), wide[0]) < 1e-6
    swapped = key_weight, query_weight, EPS, offset
    other = store_and_attend(
        heads, *given, new, own, c, s, bounds, 0.5, 0.0, None, 0, False, *swapped
    )
    assert relative_error(other.double(), expected) > 1e-2
