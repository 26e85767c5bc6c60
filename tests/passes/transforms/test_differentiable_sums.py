"""Sums over ranks with gradients, with a group of ranks that all have the same part of a sum.

Two processes that really sum distil with the same pass in `tests/distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx

from adaskip_passes import UnsupportedError, _torch, run_passes
from adaskip_passes.transforms.differentiable_sums import DifferentiableSums, divided

RANKS = 3


@fx.wrap
def all_reduce(x: Tensor, operation: str, group: str) -> Tensor:
    """As ``torch.ops._c10d_functional.all_reduce`` of a torch where it has no gradient."""
    assert (operation, group) == ("sum", "tp")
    return x.detach() * RANKS


@fx.wrap
def wait_tensor(x: Tensor) -> Tensor:
    """As ``torch.ops._c10d_functional.wait_tensor``."""
    return x


@fx.wrap
def redistribute(x: Tensor) -> Tensor:
    """As of a ``DTensor`` that is gathered: the gradient is the rank's share of it."""
    return divided(x, RANKS)


@fx.wrap
def c10d_gather(x: Tensor) -> Tensor:
    """Something else that ranks exchange."""
    return x


@pytest.fixture(autouse=True)
def ranks() -> Iterator[None]:
    with patch.object(_torch, "all_reduced", lambda x, group: x * RANKS):
        yield


def layer(x: Tensor, w: Tensor) -> Tensor:
    y = torch.sin(x) * w
    y.copy_(wait_tensor(all_reduce(y, "sum", "tp")))
    return x + y


def whole_head(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (layer(layer(x, w), w),)


def shared_head(x: Tensor, w: Tensor) -> tuple[Tensor]:
    of_embeddings = redistribute(x.detach()) * 0
    return (redistribute(layer(layer(x + of_embeddings, w), w)),)


def gathers_between(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (layer(redistribute(layer(x, w)), w),)


def gathers_otherwise(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (c10d_gather(layer(x, w)),)


def plain(x: Tensor, w: Tensor) -> Tensor:
    """The same in one process, which has all parts."""
    for _ in range(2):
        x = x + torch.sin(x) * w * RANKS
    return x


def gradient(function: Callable[..., Any]) -> Tensor:
    x = torch.linspace(-1, 2, 7, dtype=torch.float64, requires_grad=True)
    w = torch.linspace(1, 2, 7, dtype=torch.float64)
    output = function(x, w)
    values = output[0] if isinstance(output, tuple) else output
    assert torch.equal(values, plain(x, w))
    (found,) = torch.autograd.grad((values**2).sum(), (x,))
    return found


@pytest.mark.parametrize("head", [whole_head, shared_head])
def test_the_gradients_of_all_ranks_add_up_to_that_of_one_process(head: Any) -> None:
    rewritten = run_passes(fx.symbolic_trace(head), (DifferentiableSums(RANKS),))
    of_all = RANKS * gradient(rewritten)  # each has the same
    torch.testing.assert_close(of_all, gradient(plain), rtol=1e-12, atol=0)


def test_a_sum_as_it_was_captured_has_another_gradient() -> None:
    """The companion."""
    of_all = RANKS * gradient(fx.symbolic_trace(whole_head))
    assert not torch.allclose(of_all, gradient(plain), rtol=0.1)


@pytest.mark.parametrize("graph", [gathers_between, gathers_otherwise])
def test_what_else_ranks_exchange_is_refused(graph: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"^ranks exchange more than sums between"):
        DifferentiableSums(RANKS)(fx.symbolic_trace(graph))
