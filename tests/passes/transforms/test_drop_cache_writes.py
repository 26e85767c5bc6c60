"""Graphs without their writes: what stays, what goes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from adaskip_passes import UnsupportedError
from adaskip_passes.transforms.drop_cache_writes import differentiable


def graph_of(build: Callable[[fx.Graph], Any]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output((build(graph),))
    return fx.GraphModule(torch.nn.Module(), graph)


def stores(graph: fx.Graph) -> fx.Node:
    """A prompt on an empty cache: keys are written through a view, and the fresh ones are read."""
    x, w, keys = (graph.placeholder(name) for name in ("x", "w", "keys"))
    k = graph.call_function(torch.mul, (x, w))
    graph.call_method("copy_", (graph.call_method("narrow", (keys, 0, 0, 3)), k))
    graph.call_function(torch._C._set_grad_enabled, (False,))
    y = graph.call_function(torch.mul, (k, 2.0))
    graph.call_method("add_", (y, 1.0))  # it changes a value that is read after it
    return graph.call_function(torch.mul, (y, x))


def reads_again(graph: fx.Graph) -> fx.Node:
    """Likewise, but attention reads the cache."""
    x, w, keys = (graph.placeholder(name) for name in ("x", "w", "keys"))
    k = graph.call_function(torch.mul, (x, w))
    graph.call_method("copy_", (keys, k))
    return graph.call_function(torch.mul, (graph.call_method("narrow", (keys, 0, 0, 3)), x))


def test_gradients_flow_and_nothing_is_stored() -> None:
    flat = graph_of(stores)
    text = flat.code
    x, w, keys = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, requires_grad=True), torch.zeros(5)
    (y,) = differentiable(flat)(x, w, keys)
    assert torch.equal(keys, torch.zeros(5))
    assert torch.equal(y, (2 * x * w + 1) * x)
    (slope,) = torch.autograd.grad(y.sum(), (w,))
    assert torch.equal(slope, 2 * x * x)
    assert torch.is_grad_enabled()
    assert flat.code == text, "the graph that was given is not changed"


def test_the_graph_as_it_was_gives_no_gradient() -> None:
    """The companion: it stores, and switches gradients off."""
    x, w, keys = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, requires_grad=True), torch.zeros(5)
    try:
        (y,) = graph_of(stores)(x, w, keys)
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert torch.equal(keys[:3], x)
    assert torch.equal(y, (2 * x * w + 1) * x)


def test_a_cache_that_is_read_again_is_refused() -> None:
    message = "mul_1 reads keys, which copy_ has written to in the same step: gradients cannot"
    with pytest.raises(UnsupportedError, match=message):
        differentiable(graph_of(reads_again))
