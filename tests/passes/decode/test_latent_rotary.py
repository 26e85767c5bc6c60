"""Of a latent cache attention rotates the rests of queries and new keys itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from adaskip_passes.decode.fuse_rotary import FuseRotary
from adaskip_passes.decode.ops import EVERY
from tests.passes.decode.test_fuse_projections import Record
from tests.support.eager_reference import relative_error

ATTEND = torch.ops.adaskip.store_and_attend_latent.default
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
RANK, REST = 12, 8


def minicpm3(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return x * c + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * s


def deepseek_v2(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Angles are complex numbers."""
    numbers = torch.view_as_complex(x.float().reshape(2, x.shape[1], 3, -1, 2))
    return torch.view_as_real(numbers * c).flatten(3).type_as(x)


def deepseek_v3(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Neighbours, which become halves."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * c - odd * s, odd * c + even * s], dim=-1)


def neighbours(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return x * c + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s


def odd_first(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([odd * c - even * s, even * c + odd * s], dim=-1)


def conjugated(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    numbers = torch.view_as_complex(x.float().reshape(2, x.shape[1], 3, -1, 2))
    return torch.view_as_real(numbers.conj().resolve_conj() * c).flatten(3).type_as(x)


def of_a_part(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    part, others = x[..., :4], x[..., 4:]
    pairs = torch.cat((-part[..., 2:], part[..., :2]), dim=-1)
    return torch.cat([part * c + pairs * s, others], dim=-1)


def inputs(angles: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Of two rows and three tokens, with so many angles; 0: complex ones of the pairs."""
    torch.manual_seed(angles)
    shapes = (2, 4, 3, RANK), (2, 4, 3, REST), (2, 1, 12, RANK), (2, 1, 12, REST)
    new = (2, 1, 3, RANK), (2, 1, 3, REST)
    turned = torch.randn(2, 1, 3, angles or REST // 2)
    both = (turned.cos(), turned.sin())
    if not angles:
        both = (torch.polar(torch.ones_like(turned), turned), turned)
    bounds = torch.tensor([[[[1, 0, EVERY, 6, 0]]], [[[0, 0, 4, 6, 0]]]])
    plain = (torch.randn(shape).to(dtype) for shape in (*shapes, *new))
    return (*plain, *(t.to(dtype) if angles else t for t in both), bounds)


def function_of(turn: Turn) -> Callable[..., Any]:
    def function(
        q: Tensor,
        r: Tensor,
        latents: Tensor,
        rests: Tensor,
        new: Tensor,
        k: Tensor,
        c: Tensor,
        s: Tensor,
        bounds: Tensor,
    ) -> Any:
        query = torch.cat((q, turn(r, c, s)), -1)
        rest = bounds, 0.5, 0.0, None
        return ATTEND(query, latents, rests, new, turn(k, c, s), None, None, *rest)

    return function


def check(function: Any, given: tuple[Tensor, ...], tolerance: float) -> tuple[Any, ...] | None:
    """How attention rotates after the pass, if it does; results and buffers are compared."""
    module = fx.symbolic_trace(function)
    Record(module).run(*[t.clone() for t in given])
    FuseRotary()(module)
    module.graph.lint()
    module.recompile()
    mine, theirs = ([t.clone() for t in given] for _ in range(2))
    pairs = [(module(*mine), function(*theirs)), *zip(mine[2:4], theirs[2:4], strict=True)]
    assert max(relative_error(a, b) for a, b in pairs) <= tolerance
    (call,) = module.graph.find_nodes(op="call_function", target=ATTEND)
    return None if call.args[5] is None else call.args[-2:]


#: How many angles, whether neighbours are pairs, and whether they are put into halves.
FORMS: dict[str, tuple[Turn, int, bool, bool]] = {
    "minicpm3": (minicpm3, 8, False, False),
    "deepseek_v2": (deepseek_v2, 0, True, False),
    "deepseek_v3": (deepseek_v3, 4, True, True),
    "neighbours": (neighbours, 8, True, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_rests_are_rotated_by_attention(name: str, dtype: torch.dtype) -> None:
    turn, angles, *kind = FORMS[name]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert check(function_of(turn), inputs(angles, dtype), tolerance) == tuple(kind)


@pytest.mark.parametrize(("turn", "angles"), [(odd_first, 4), (conjugated, 0), (of_a_part, 4)])
def test_other_rotations_stay(turn: Turn, angles: int) -> None:
    assert check(function_of(turn), inputs(angles), 0.0) is None


def test_queries_that_are_not_put_together_stay() -> None:
    def function(*given: Any) -> Any:
        q, r, latents, rests, new, k, c, s, bounds = given
        query = torch.cat((q, minicpm3(r, c, s)), -1) * 2
        rest = bounds, 0.5, 0.0, None
        return ATTEND(query, latents, rests, new, minicpm3(k, c, s), None, None, *rest)

    def named(
        q: Any, r: Any, latents: Any, rests: Any, new: Any, k: Any, c: Any, s: Any, bounds: Any
    ) -> Any:
        return function(q, r, latents, rests, new, k, c, s, bounds)

    assert check(named, inputs(8), 0.0) is None
