"""What a capture leaves behind is let go of at its end; what is old is looked at when it has grown.

Python itself collects nothing in these tests.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from adaskip_passes import capture
from adaskip_passes.tracing import dynamo
from adaskip_passes.tracing.repeated_layers.mark import Repeat


class Layer(nn.Module):
    """A layer that Dynamo traces as it is, but not as a stand-in for others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if type(self) is not Layer:
            torch._dynamo.graph_break()
        result: Tensor = self.linear(x)
        return result


def run(layers: nn.ModuleList, x: Tensor) -> tuple[Tensor]:
    for layer in layers:
        x = layer(x)
    return (x,)


@pytest.fixture
def collected() -> Iterator[list[int]]:
    """The generations that are collected."""
    gc.collect()
    gc.disable()
    generations: list[int] = []

    def begins(phase: str, about: dict[str, int]) -> None:
        if phase == "start":
            generations.append(about["generation"])

    gc.callbacks.append(begins)
    yield generations
    gc.callbacks.remove(begins)
    gc.enable()


def tensor_of_a_caller() -> weakref.ref[Tensor]:
    """A tensor that is in nothing but a frame, from which something is captured at second try."""
    held = torch.ones(2, 2)
    layers = nn.ModuleList(Layer() for _ in range(3))
    arguments = {"layers": layers, "x": held}
    with torch.no_grad():
        got = capture(run, arguments, lambda made: made, Repeat("L['layers']", [*layers], {}))
    assert "graph_break" in got.why_traced
    return weakref.ref(held)


@pytest.mark.parametrize("old", [0, 10**9])
def test_nothing_of_the_callers_stays(
    collected: list[int], monkeypatch: pytest.MonkeyPatch, old: int
) -> None:
    """Whether all that is old is collected as well or not."""
    monkeypatch.setattr(dynamo, "_after_full", [old])
    assert tensor_of_a_caller()() is None
    assert (2 in collected) == (old == 0)


def test_it_would_stay(collected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: there are cycles, and they do hold the frames."""
    monkeypatch.setattr(dynamo.gc, "collect", lambda *_: 0)
    assert tensor_of_a_caller()() is not None
    assert collected == []


def test_what_is_old_is_collected_when_there_is_more_of_it(
    collected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = len(gc.get_objects(generation=2))
    monkeypatch.setattr(dynamo, "_after_full", [2 * old])
    tensor_of_a_caller()
    assert collected == [0, 1]  # the first try ends with an exception
    dynamo._after_full[0] = old // 2
    tensor_of_a_caller()
    assert collected[2:] == [0, 1, 2]
    assert dynamo._after_full[0] >= old - 10
    tensor_of_a_caller()
    assert collected[5:] == [0, 1]


def test_python_collects_again_afterwards() -> None:
    assert gc.isenabled()
    tensor_of_a_caller()
    assert gc.isenabled()
