"""Slices of lists of modules are the same modules in the same order, and no new list is traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adaskip_passes.tracing import list_slices
from tests.support.fx_decoders import trace


class Layers(nn.Module):
    """Runs some of its layers."""

    def __init__(self, kind: type[nn.ModuleList], chosen: slice) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = kind(nn.Linear(3, 3) for _ in range(4))
        self.chosen = chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        picked: Any = self.layers[self.chosen]
        for number, layer in enumerate(picked):
            x = layer(x) * (number + 1) + len(picked)
        if len(picked):
            x = x + picked[-1](x)
        return x


class Turned(nn.ModuleList):
    """A list that gives its slices backwards."""

    def __getitem__(self, index: Any) -> Any:
        layers = list(self._modules.values())
        return layers[index][::-1] if isinstance(index, slice) else layers[index]


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(x)
    return result


X = torch.arange(6.0).view(2, 3)
SLICES = [slice(2), slice(1, None), slice(None, None, -1), slice(-3, -1), slice(9, None)]


def captured(model: nn.Module) -> tuple[torch.Tensor, list[str]]:
    """What a captured graph gives, and what it calls."""
    with torch.no_grad():
        found = trace(run, model=model, x=X)
        values = found.binder(found.sources)({"model": model, "x": X})
        return found.graph(*values)[0], [str(n.target) for n in found.graph.graph.nodes]


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.ModuleList, Turned])
@pytest.mark.parametrize("chosen", SLICES)
def test_the_same_modules_in_the_same_order(kind: type[nn.ModuleList], chosen: slice) -> None:
    model = Layers(kind, chosen)
    assert torch.equal(captured(model)[0], model(X))


@torch.no_grad()
def test_the_order_matters() -> None:
    """The companion."""
    for kind, other in ((nn.ModuleList, Turned), (Turned, nn.ModuleList)):
        assert not torch.equal(Layers(kind, slice(3))(X), captured(Layers(other, slice(3)))[0])


def test_no_list_is_made_in_the_graph() -> None:
    """torch counts the modules that are made, in a call that would stay in the graph."""
    assert not any("log_api" in called for called in captured(Layers(nn.ModuleList, slice(2)))[1])


def test_torch_has_its_own_lists_again_and_meanwhile_elsewhere() -> None:
    model = Layers(nn.ModuleList, slice(2))
    before = nn.ModuleList.__getitem__
    captured(model)
    assert nn.ModuleList.__getitem__ is before
    with list_slices.plain_slices():
        assert nn.ModuleList.__getitem__ is not before
        assert type(model.layers[:2]) is nn.ModuleList
