"""The symbols that describe a piece's inputs are among them."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from adaskip_passes.analysis.symbolic_lengths import length_inputs


def graph_of_lengths() -> tuple[fx.Graph, dict[str, fx.Node]]:
    """Placeholders for two symbols, and values that depend on them."""
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    tensor = mode.from_tensor(torch.zeros(7, 9), static_shapes=False)
    rows, columns = tensor.shape
    graph = fx.Graph()
    values = {
        "rows": rows,
        "columns": columns,
        "tensor": tensor,
        "less": rows - 1,
        "both": rows + columns,
        "number": 3,
    }
    nodes = {}
    for name, value in values.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["example_value"] = value
    return graph, nodes


def names_of(given: list[str]) -> list[str]:
    graph, nodes = graph_of_lengths()
    return [n.name for n in length_inputs(graph, [nodes[name] for name in given])]


def test_shapes() -> None:
    assert names_of(["tensor"]) == ["rows", "columns"]
    assert names_of(["rows", "tensor"]) == ["columns"]


def test_numbers_that_were_computed_of_symbols() -> None:
    """A compiler's cache writes `less == rows - 1` as a guard, and looks `rows` up."""
    assert names_of(["less"]) == ["rows"]
    assert names_of(["both"]) == ["rows", "columns"]
    assert names_of(["less", "rows"]) == []


def test_symbols_and_constants_need_nothing() -> None:
    assert names_of(["rows", "number"]) == []
