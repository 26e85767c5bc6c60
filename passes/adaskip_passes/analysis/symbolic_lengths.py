"""Symbolic lengths as inputs.

A tensor whose size is symbolic, or a number that was computed of symbols, is only half described
without the symbols themselves as inputs: a compiler's caches look up symbols, and the guards about
them, among the integer inputs, and an entry whose guard names another one cannot be read again.
Dynamo's graphs have these inputs; pieces cut from them must have them as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx


def length_inputs(graph: fx.Graph, inputs: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the integer placeholders of `graph` for every symbol that describes `inputs`.

    Those are the symbols in shapes of tensors, and in integers that are not symbols themselves.

    Placeholders that are among `inputs` already are left out.
    """
    nodes = list(inputs)
    by_symbol: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt):
            by_symbol.setdefault(value.node.expr, node)
    present = {
        n.meta["example_value"].node.expr
        for n in nodes
        if isinstance(n.meta.get("example_value"), torch.SymInt)
    }
    wanted: dict[Any, None] = {}
    for node in nodes:
        wanted.update(dict.fromkeys(_symbols(node.meta.get("example_value"))))
    return [by_symbol[s] for s in wanted if s in by_symbol and s not in present]


def describing(graph: fx.Graph) -> set[fx.Node]:
    """Return the placeholders that are symbols which other placeholders with users depend on."""
    used = [n for n in graph.find_nodes(op="placeholder") if n.users]
    return {*length_inputs(graph, used)}


def _symbols(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        entries: tuple[Any, ...] = (*value.size(), *value.stride())
    else:
        entries = (value,)
    expressions = [e.node.expr for e in entries if isinstance(e, torch.SymInt)]
    return sorted({s for e in expressions for s in e.free_symbols}, key=str)
