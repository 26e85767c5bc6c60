"""Symbolic lengths as inputs.

A tensor whose size is symbolic is only half described without the symbol itself as an input: a
compiler's caches look up symbols, and the guards about them, among the integer inputs. Dynamo's
graphs have these inputs; pieces cut from them must have them as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx


def length_inputs(graph: fx.Graph, inputs: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the integer placeholders of `graph` for every symbol in the shapes of `inputs`.

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


def _symbols(value: Any) -> list[Any]:
    if not isinstance(value, torch.Tensor):
        return []
    entries = (*value.size(), *value.stride())
    expressions = [e.node.expr for e in entries if isinstance(e, torch.SymInt)]
    return sorted({s for e in expressions for s in e.free_symbols}, key=str)
