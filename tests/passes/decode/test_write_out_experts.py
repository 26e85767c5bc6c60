"""Experts of one token are written out, and give what every expert does in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from adaskip_passes.decode.expert_ops import run_experts
from adaskip_passes.decode.write_out_experts import WriteOutExperts
from tests.support.eager_reference import relative_error
from tests.support.expert_reference import Experts, random_experts, written_out

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
RUN = torch.ops.adaskip.run_experts.default
#: experts, chosen, transposed, interleaved, clamp, with biases
CASES = (
    (4, 2, False, False, 0.0, False),
    (8, 3, False, True, 0.0, True),
    (4, 2, True, False, 0.7, False),
    (5, 4, True, True, 0.7, True),
)


def passed(one: Experts) -> tuple[fx.GraphModule, int]:
    """The operator's call after the pass, and how many were written out."""
    graph = fx.Graph()
    inputs = [
        graph.placeholder(n) if isinstance(v, torch.Tensor) else v for n, v in vars(one).items()
    ]
    for node in graph.nodes:
        node.meta["example_value"] = getattr(one, node.name)
    graph.output(graph.call_function(RUN, tuple(inputs)))
    result = WriteOutExperts()(fx.GraphModule({}, graph))
    result.graph_module.recompile()
    return result.graph_module, result.changes


def run(module: fx.GraphModule, one: Experts) -> torch.Tensor:
    tensors = (v for v in one.inputs if isinstance(v, torch.Tensor))
    result: torch.Tensor = module(*tensors)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_token(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    one = random_experts(1, *case, dtype=dtype)
    module, changes = passed(one)
    assert changes == 1
    assert not module.graph.find_nodes(op="call_function", target=RUN)
    got = run(module, one)
    assert got.dtype == dtype
    assert got.shape == one.hidden.shape
    assert relative_error(got.double(), written_out(one)) < DTYPES[dtype]


@pytest.mark.parametrize("field", ["up", "down", "up_bias", "down_bias", "shares", "alpha"])
def test_everything_counts(field: str) -> None:
    """The companion: what is changed is noticed."""
    one = random_experts(1, 4, 2, True, True, 0.7, True, dtype=torch.float32)
    got = run(passed(one)[0], one)
    before = getattr(one, field)
    setattr(one, field, before * 1.1 if isinstance(before, float) else before.clone() * 1.1)
    assert relative_error(got.double(), written_out(one)) > 1e-3


def test_a_number_that_no_expert_has_gives_nothing() -> None:
    one = random_experts(1, 4, 3, False, False, 0.0, True, dtype=torch.float32)
    one.chosen = torch.tensor([[4, 1, -1]])
    got = run(passed(one)[0], one)
    one.chosen, one.shares = one.chosen[:, 1:2], one.shares[:, 1:2]
    assert relative_error(got.double(), written_out(one)) < 1e-6


def test_more_tokens_are_left_alone() -> None:
    one = random_experts(2, 4, 2, False, False, 0.0, False, dtype=torch.float32)
    module, changes = passed(one)
    assert changes == 0
    assert torch.equal(run(module, one), run_experts(*one.inputs))
