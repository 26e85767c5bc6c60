"""What traced code has read in Python, by what Dynamo guards."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaskip_passes import capture
from adaskip_passes.tracing.capture import Capture
from adaskip_passes.tracing.reads import Reads, readable

FACTOR = 2.0
TABLE: dict[str, float] = {}
THIS = sys.modules[__name__]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.shift = 1.0
        self.unread = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.linear(x)) + self.shift


def scaled(x: Tensor) -> Tensor:
    return x * (FACTOR if not TABLE else 0.0)


def traced(model: Any, x: Any) -> Any:
    return model(x)


def other(x: Tensor) -> Tensor:
    return -x


@pytest.fixture(scope="module")
def reads() -> Reads:
    found: list[Capture] = []
    capture(traced, {"model": Model().eval(), "x": torch.ones(2, 3)}, found.append)
    return found[0].reads


def test_names_of_what_was_read(reads: Reads) -> None:
    assert {"linear", "shift", "FACTOR", "scaled", "_forward_hooks"} <= reads.names
    assert "unread" not in reads.names


@pytest.mark.parametrize(("name", "value"), [("FACTOR", 3.0), ("scaled", other)])
def test_a_global_that_has_changed(
    reads: Reads, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    assert reads.hold()
    assert reads.changed() == []
    monkeypatch.setattr(THIS, name, value)
    assert not reads.hold()
    assert any(name in source for source in reads.changed())
    monkeypatch.undo()
    assert reads.hold()


def test_a_container_that_was_empty(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of others it is looked at which object they are: what was read of them is read by itself."""
    monkeypatch.setitem(TABLE, "a", 1.0)
    assert not reads.hold()
    monkeypatch.undo()
    assert reads.hold()


def test_a_global_hook(reads: Reads) -> None:
    """torch's own dictionary of hooks on all modules."""
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    assert not reads.hold()
    handle.remove()
    assert reads.hold()


def test_what_is_looked_at_anyway_is_left_out(
    reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    (factor,) = (source for source in reads.sources if source.endswith("FACTOR"))
    less = reads.beyond({factor})
    monkeypatch.setattr(THIS, "FACTOR", 3.0)
    assert less.hold()
    assert not reads.hold()
    assert set(less.sources) == set(reads.sources) - {factor}


def test_nothing_read_holds_for_ever() -> None:
    assert Reads().hold()
    assert Reads().changed() == []


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("L['model']._modules['layers']._modules['1'].eps", "layers.1.eps"),
        ("G['__import_a_dot_b'].table", "a.b.table"),
        ("L['model']._forward_hooks[list(dict.keys(L['model']._forward_hooks))[0]]",
         "_forward_hooks[0]"),
        ("L['cache'].layers", "L['cache'].layers"),
    ],
)  # fmt: skip
def test_sources_as_users_write_them(source: str, text: str) -> None:
    assert readable(source) == text
