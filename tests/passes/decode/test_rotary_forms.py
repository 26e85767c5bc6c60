"""The ways in which families write a rotation: neighbours as pairs, part of a head, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from adaskip_passes.decode.fuse_rotary import FuseRotary
from tests.passes.decode.test_fuse_projections import Record
from tests.passes.decode.test_fuse_rotary import STORE_AND_ATTEND, inputs, rotates
from tests.support.eager_reference import relative_error

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
Prepare = Callable[[Tensor], Tensor]
BFLOAT16 = torch.bfloat16


def halves(x: Tensor, middle: int) -> Tensor:
    return torch.cat((-x[..., middle:], x[..., :middle]), dim=-1)


def neighbours(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def neighbours_from_0(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def cohere(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    wide = x.float()
    return ((wide * c) + (neighbours(wide) * s)).to(dtype=x.dtype)


def ernie(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """What is crossed is widened by itself."""
    return ((x.float() * c) + (neighbours_from_0(x).float() * s)).to(x.dtype)


def glm(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    part, others = x[..., :4], x[..., 4:]
    return torch.cat([part * c + neighbours(part) * s, others], dim=-1)


def phi(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    part, others = x[..., :6], x[..., 6:]
    return torch.cat((part * c + halves(part, 3) * s, others), dim=-1)


def olmo2(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return ((x * c) + (halves(x, 4) * s)).to(x.dtype)


def first(count: int) -> Prepare:
    return lambda angles: angles[..., :count]


def repeated(count: int) -> Prepare:
    return lambda angles: angles[..., :count].repeat_interleave(2, dim=-1)


FORMS: dict[str, tuple[Turn, Prepare, int, bool, int]] = {
    # its angles, its dimension, whether neighbours are pairs, and how many angles are read
    "cohere": (cohere, first(8), 8, True, 8),
    "ernie": (ernie, repeated(4), 8, True, 4),
    "glm": (glm, repeated(2), 4, True, 2),
    "phi": (phi, first(6), 6, False, 6),
    "olmo2": (olmo2, first(8), 8, False, 8),
}
IN_FLOAT32 = ("cohere", "ernie", "olmo2")


def part_of_another(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    part, others = x[..., :4], torch.tanh(x)[..., 4:]
    return torch.cat([part * c + halves(part, 2) * s, others], dim=-1)


def others_first(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    part, others = x[..., 4:], x[..., :4]
    return torch.cat([part * c + halves(part, 2) * s, others], dim=-1)


def overlapping(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    part, others = x[..., :4], x[..., 2:6]
    return torch.cat([part * c + halves(part, 2) * s, others], dim=-1)


def neighbours_backwards(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    crossed = torch.stack((x[..., 1::2], -x[..., ::2]), -1).flatten(-2)
    return x * c + crossed * s


def neighbours_of_another(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return x * c + neighbours(torch.tanh(x)) * s


def stacked_before(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    crossed = torch.stack((-x[..., 1::2], x[..., ::2]), -2).flatten(-2)
    return x * c + crossed * s


def rounded_before(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    narrow = x.to(BFLOAT16)
    return (narrow * c + neighbours(narrow) * s).to(x.dtype)


OTHERS: dict[str, tuple[Turn, Prepare]] = {
    "part of another": (part_of_another, first(4)),
    "others first": (others_first, first(4)),
    "overlapping": (overlapping, first(4)),
    "neighbours backwards": (neighbours_backwards, first(8)),
    "neighbours of another": (neighbours_of_another, first(8)),
    "stacked before": (stacked_before, first(8)),
    "rounded before": (rounded_before, lambda angles: angles.to(BFLOAT16)),
}


def graph_of(turn: Turn, prepare: Prepare, given: Any) -> tuple[fx.GraphModule, Callable[..., Any]]:
    def function(
        q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, c: Tensor, s: Tensor, b: Any
    ) -> Any:
        c, s, rest = prepare(c), prepare(s), (b, 0.5, 0.0, None)
        turned = turn(q, c, s), turn(k, c, s)
        return STORE_AND_ATTEND(turned[0], keys, values, turned[1], v, None, None, *rest)

    module = fx.symbolic_trace(function)
    Record(module).run(*[t.clone() for t in given])
    FuseRotary()(module)
    module.graph.lint()
    module.recompile()
    return module, function


def check(
    turn: Turn, prepare: Prepare, given: Any, tolerance: float, cats: int = 0
) -> tuple[Any, ...] | None:
    """How attention rotates after the pass, if it does; results and buffers are compared."""
    module, function = graph_of(turn, prepare, given)
    mine, theirs = ([t.clone() for t in given] for _ in range(2))
    pairs = [(module(*mine), function(*theirs)), *zip(mine, theirs, strict=True)]
    assert max(relative_error(a, b) for a, b in pairs) <= tolerance
    if not rotates(module):
        return None
    (call,) = module.graph.find_nodes(op="call_function", target=STORE_AND_ATTEND)
    assert len(module.graph.find_nodes(op="call_function", target=torch.cat)) == cats
    return (*call.args[-2:], call.args[5].meta["example_value"].shape[-1])


@pytest.mark.parametrize(("rows", "tokens", "by_row"), [(1, 1, False), (2, 1, True), (2, 3, True)])
@pytest.mark.parametrize("name", FORMS)
def test_a_rotation_is_known_by_how_it_is_written(
    name: str, rows: int, tokens: int, by_row: bool
) -> None:
    turn, prepare, *form = FORMS[name]
    assert check(turn, prepare, inputs(rows, tokens, by_row), 1e-6) == tuple(form)


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_it_may_be_computed_in_float32(name: str) -> None:
    """Queries and keys are as they were before, whichever dtype angles have."""
    *before, c, s, b = inputs()
    half = [t.to(BFLOAT16) for t in before]
    turn, prepare, *form = FORMS[name]
    for angles in ((c, s), (c.to(BFLOAT16), s.to(BFLOAT16))):
        if name != "olmo2" or angles[0].dtype == torch.float32:
            assert check(turn, prepare, (*half, *angles, b), 8e-3) == tuple(form)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_another_rotation_stays(name: str) -> None:
    assert check(*OTHERS[name], inputs(), 0.0) is None


def test_angles_need_not_be_alike_in_a_pair() -> None:
    """Angles of halves, beside neighbours that are pairs."""

    def turn(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return x * c + neighbours(x) * s

    def prepare(angles: Tensor) -> Tensor:
        return torch.cat((angles[..., :4], angles[..., 4:] / 2), -1)

    assert check(turn, prepare, inputs(), 1e-6, cats=2) == (8, True, 8)


def test_float64_stays_float64() -> None:
    given = [t.double() if t.is_floating_point() else t for t in inputs()]
    for turn, prepare, *form in (FORMS["glm"], FORMS["phi"]):
        assert check(turn, prepare, given, 1e-14) == tuple(form)
