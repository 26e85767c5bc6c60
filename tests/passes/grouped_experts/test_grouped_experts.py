"""What is done beside the grouped products of experts, row by row in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from adaskip_passes.grouped_experts.ops import gate_grouped, gather_grouped, sum_grouped
from adaskip_passes.grouped_experts.plain_experts import PlainExperts
from tests.support.eager_reference import relative_error
from tests.support.grouped_reference import Grouped, gated_by_row, random_rows, summed_by_token

#: interleaved, clamp, with biases
KINDS = ((False, 0.0, False), (False, 0.7, True), (True, 0.0, True), (True, 0.7, False))


def test_rows_are_of_their_tokens() -> None:
    hidden, order = torch.arange(4.0)[:, None].repeat(1, 5), torch.randperm(12)
    got = gather_grouped(hidden, order, 3)
    assert got.shape == (12, 5)
    assert got[:, 2].tolist() == [pair // 3 for pair in order.tolist()]
    torch.library.opcheck(gather_grouped, (hidden, order, 3))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gates(kind: tuple[Any, ...], dtype: torch.dtype) -> None:
    one = random_rows(7, 5, 3, *kind, dtype=dtype)
    got, expected = gate_grouped(*one.gate_inputs), gated_by_row(one)
    assert got.dtype == dtype
    assert relative_error(got.double(), expected) < 1e-6
    one.interleaved = not one.interleaved
    assert relative_error(gate_grouped(*one.gate_inputs).double(), expected) > 1e-2


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums(biased: bool, dtype: torch.dtype) -> None:
    one = random_rows(7, 5, 3, False, 0.0, biased, dtype=dtype)
    got, expected = sum_grouped(*one.sum_inputs), summed_by_token(one)
    assert got.dtype == dtype
    assert relative_error(got.double(), expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    one.places = one.places.flip(1)
    assert relative_error(sum_grouped(*one.sum_inputs).double(), expected) > 1e-2


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shapes_are_known_without_running(kind: tuple[Any, ...]) -> None:
    one = random_rows(7, 5, 3, *kind, dtype=torch.float32)
    torch.library.opcheck(gate_grouped, one.gate_inputs)
    torch.library.opcheck(sum_grouped, one.sum_inputs)


def both_in_turn(one: Grouped) -> Any:
    class Both(torch.nn.Module):
        def forward(self, both: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
            order = torch.arange(both.shape[0])
            both = torch.ops.adaskip.gather_grouped.default(both, order, 1)
            _, *gate = one.gate_inputs
            _, *rest = one.sum_inputs
            gates = torch.ops.adaskip.gate_grouped.default(both, *gate)
            return gates, torch.ops.adaskip.sum_grouped.default(outputs, *rest)

    return fx.symbolic_trace(Both())


def test_gradients_flow_through_what_takes_their_place() -> None:
    one = random_rows(7, 5, 3, True, 0.7, True, dtype=torch.float64)
    graph = both_in_turn(one)
    assert PlainExperts()(graph).changes == 3
    graph.recompile()
    given = tuple(t.clone().requires_grad_() for t in (one.both, one.outputs))
    assert torch.autograd.gradcheck(graph, given)
    for got, expected in zip(graph(*given), (gated_by_row(one), summed_by_token(one)), strict=True):
        assert relative_error(got.detach(), expected) < 1e-12


def test_the_operators_have_no_gradients() -> None:
    """The companion."""
    one = random_rows(7, 5, 3, True, 0.7, True, dtype=torch.float64)
    given = tuple(t.clone().requires_grad_() for t in (one.both, one.outputs))
    gates, sums = both_in_turn(one)(*given)
    with pytest.raises(RuntimeError):
        (gates.sum() + sums.sum()).backward()
