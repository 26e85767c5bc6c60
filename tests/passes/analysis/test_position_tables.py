"""Which graphs read a table by position: by an index, or by cutting a part out of it."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

from adaskip_passes.analysis.position_tables import reads_position_table

TABLE = torch.ones(8, 4)
IDS = torch.ones(1, 3, dtype=torch.int64)


class Form:
    """A graph with a table, tokens, positions, and how many tokens there are."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.table, self.tokens, self.positions = (
            self.made(self.graph.placeholder(name), value)
            for name, value in (("table", TABLE), ("tokens", IDS), ("positions", IDS))
        )
        self.count = self.made(self.graph.call_method("size", (self.tokens, 1)), 3)

    def made(self, node: fx.Node, value: object) -> fx.Node:
        node.meta["example_value"] = value
        return node

    def call(self, function: Callable[..., object], *args: object) -> fx.Node:
        return self.made(self.graph.call_function(function, args), TABLE)


READ: dict[str, Callable[[Form], object]] = {
    "embedding": lambda f: f.call(torch.nn.functional.embedding, f.positions, f.table),
    "table[positions]": lambda f: f.call(operator.getitem, f.table, f.positions),
    "table[:count]": lambda f: f.call(operator.getitem, f.table, slice(None, f.count)),
    "table[count:]": lambda f: f.call(operator.getitem, f.table, slice(f.count, None)),
    "table.float()[None, :count]": lambda f: f.call(
        operator.getitem, f.call(torch.relu, f.table), (None, slice(0, f.count, None))
    ),
    "narrow": lambda f: f.call(torch.narrow, f.table, 0, 0, f.count),
}
NOT: dict[str, Callable[[Form], object]] = {
    "embedding of tokens": lambda f: f.call(torch.nn.functional.embedding, f.tokens, f.table),
    "table[:3]": lambda f: f.call(operator.getitem, f.table, slice(None, 3)),
    "narrow by numbers": lambda f: f.call(torch.narrow, f.table, 0, 0, 3),
    "tokens[:count]": lambda f: f.call(operator.getitem, f.tokens, slice(None, f.count)),
    "what tokens are in": lambda f: f.call(
        operator.getitem, f.call(torch.add, f.table, f.tokens), slice(None, f.count)
    ),
}


@pytest.mark.parametrize("name", [*READ, *NOT])
def test_what_is_read_by_position(name: str) -> None:
    form = Form()
    (READ | NOT)[name](form)
    found = reads_position_table(form.graph, [form.table], [form.tokens])
    assert found == (name in READ)
