"""Sums over ranks as one operator: FuseRankSums keeps results, with a group whose sum is a factor.

Two processes that really sum run the same pass in `tests/distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx

from adaskip_passes import FuseRankSums, _torch
from adaskip_passes.decode import rank_sums, shared_memory
from adaskip_passes.decode.rank_sums import sum_over_ranks
from tests.passes.decode.test_fuse_projections import rest, same_results, traced

SUM = torch.ops.adaskip.sum_over_ranks.default
RANKS = 3  # each has the same part


@fx.wrap
def all_reduce(x: Tensor, operation: str, group: str) -> Tensor:
    """As ``torch.ops._c10d_functional.all_reduce``: what it returns is not its argument."""
    assert (operation, group) == ("sum", "tp") or operation == "max"
    return x * RANKS


@fx.wrap
def wait_tensor(x: Tensor) -> Tensor:
    """As ``torch.ops._c10d_functional.wait_tensor``."""
    return x


@pytest.fixture(autouse=True)
def ranks() -> Iterator[None]:
    def reduced(x: Tensor, residual: Tensor | None, group: str) -> Tensor:
        total = wait_tensor(all_reduce(x, "sum", group))
        return total if residual is None else total + residual

    with patch.object(rank_sums, "all_reduced", reduced):
        yield


def branch(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    y.copy_(wait_tensor(all_reduce(y, "sum", "tp")))
    return y


def in_a_residual(x: Tensor, w: Tensor) -> Tensor:
    return x + branch(x, w)


def read_twice(x: Tensor, w: Tensor) -> Tensor:
    y = branch(x, w)
    return torch.cat([y + x, y])


def before_its_sum(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    part = y.relu()
    y.copy_(wait_tensor(all_reduce(y, "sum", "tp")))
    return y + part


def of_an_input(x: Tensor, w: Tensor) -> Tensor:
    x.copy_(wait_tensor(all_reduce(x, "sum", "tp")))
    return x @ w


def read_by_its_base(x: Tensor, w: Tensor) -> Tensor:
    base = x @ w
    y = base.view(-1)
    y.copy_(wait_tensor(all_reduce(y, "sum", "tp")))
    return base + x


def of_a_view(x: Tensor, w: Tensor) -> Tensor:
    y = (x @ w).view(-1)
    y.copy_(wait_tensor(all_reduce(y, "sum", "tp")))
    return y + x.view(-1)


def written_again(x: Tensor, w: Tensor) -> Tensor:
    return branch(x, w).mul_(2) + x


def elsewhere(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return wait_tensor(all_reduce(y, "sum", "tp")) + y


def a_maximum(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    y.copy_(wait_tensor(all_reduce(y, "max", "tp")))
    return y + x


def residual_is_written(x: Tensor, w: Tensor) -> Tensor:
    y = branch(x, w)
    x.mul_(2)
    return y + x


def fused(function: Callable[..., Tensor]) -> tuple[fx.GraphModule, list[fx.Node]]:
    inputs = torch.rand(2, 8), torch.rand(8, 8)
    module = traced(function, *inputs)
    FuseRankSums()(module)
    module.recompile()
    same_results(module, function, *inputs)
    return module, list(module.graph.find_nodes(op="call_function", target=SUM))


@pytest.mark.parametrize(
    "function",
    [in_a_residual, branch, read_twice, residual_is_written, of_a_view, written_again],
)
def test_a_sum_is_one_operator(function: Callable[..., Tensor]) -> None:
    module, (call,) = fused(function)
    assert not rest(module) & {"all_reduce", "wait_tensor", "copy_"}
    assert (call.args[1] is not None) == (
        function in (in_a_residual, residual_is_written, of_a_view)
    )
    assert call.args[2] == "tp"


@pytest.mark.parametrize(
    "function", [before_its_sum, of_an_input, read_by_its_base, elsewhere, a_maximum]
)
def test_what_is_left_alone(function: Callable[..., Tensor]) -> None:
    module, calls = fused(function)
    assert not calls
    assert "all_reduce" in rest(module)


@pytest.mark.breaks
def test_a_base_that_is_read_later_would_be_noticed() -> None:
    with (
        patch("adaskip_passes.decode.fuse_rank_sums._is_its_own", lambda x: True),
        pytest.raises(AssertionError),
    ):
        fused(read_by_its_base)


def test_the_operator() -> None:
    inputs = torch.rand(2, 8), torch.rand(2, 8), "tp"
    torch.testing.assert_close(sum_over_ranks(*inputs), RANKS * inputs[0] + inputs[1])
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(sum_over_ranks, inputs, test_utils=checks)


def test_a_group_that_is_none_has_no_memory_to_share() -> None:
    with patch.object(torch.cuda, "is_current_stream_capturing", lambda: False):
        assert shared_memory.shared_memory("none", torch.device("cpu")) is None
    shared_memory.stop_waiting("none")
    shared_memory.forget()
    assert not shared_memory._of_groups


@pytest.mark.parametrize(("own", "of_all"), [(True, 2), (True, 1), (False, 1), (False, 0)])
def test_all_ranks_share_memory_or_none_does(
    monkeypatch: pytest.MonkeyPatch, own: bool, of_all: int
) -> None:
    asked = list[float]()

    def memory(nbytes: int, device: torch.device, group: str) -> tuple[object, int, list[int]]:
        if not own:
            raise RuntimeError("no peer access")
        return object(), 1, [0, 4096]

    def summed(x: Tensor, group: str) -> Tensor:
        asked.append(x.item())
        return torch.tensor([float(of_all)])

    monkeypatch.setattr(_torch, "ranks_of", lambda group: 2)
    monkeypatch.setattr(_torch, "symmetric_memory", memory)
    monkeypatch.setattr(_torch, "all_reduced", summed)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    found = shared_memory.shared_memory("two", torch.device("cpu"))
    shared_memory.forget()
    assert asked == [float(own)]
    assert (found is not None) == (of_all == 2)
    if found is not None:
        assert (found.rank, found.size, found.addresses.tolist()) == (1, 2, [0, 4096])
