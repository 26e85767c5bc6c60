"""Whether a decoder looks something up by position: such a table has an end, a formula has none."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from .effects import operation

#: Lookups, by the places of table and index among their arguments.
_LOOKUPS = {
    "embedding": (1, 0),
    "index_select": (0, 2),
    "gather": (0, 2),
    "take_along_dim": (0, 1),
    "getitem": (0, 1),
}


def reads_position_table(
    graph: fx.Graph, weights: Collection[fx.Node], tokens: Collection[fx.Node]
) -> bool:
    """Return whether a graph reads weights at places that its positions say, and no token does.

    Args:
        graph: of a prompt.
        weights: its placeholders that stay the same from step to step.
        tokens: its placeholders for new tokens, ids or embeddings.
    """
    return any(_is_by_position(node, set(weights), set(tokens)) for node in graph.nodes)


def _is_by_position(node: fx.Node, weights: set[fx.Node], tokens: set[fx.Node]) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if _cuts(node):
        table = node.args[0]
        assert isinstance(table, fx.Node)
        return _is_tensor(table) and _is_of(table, weights)
    places = _LOOKUPS.get(operation(node))
    if places is None:
        return False
    named = {"input": places[1], "weight": places[0]}  # as F.embedding calls them
    given: dict[Any, Any] = dict(enumerate(node.args))
    given.update((named.get(name), value) for name, value in node.kwargs.items())
    table, index = (given.get(place) for place in places)
    for part in index if isinstance(index, tuple | list) else (index,):
        if not (isinstance(table, fx.Node) and _is_tensor(table) and _is_tensor(part)):
            continue
        assert isinstance(part, fx.Node)
        by = {n for n in _made_of(part) if n.op == "placeholder"}
        if _is_of(table, weights) and not by & (weights | tokens):
            return True
    return False


def _cuts(node: fx.Node) -> bool:
    """Return whether a node cuts a part out of a tensor that depends on how many tokens there are.

    (``table[start:stop]``, ``table.narrow(0, start, tokens)``; lengths are numbers of the graph.)
    """
    if operation(node) == "getitem":
        parts = node.args[1] if isinstance(node.args[1], tuple | list) else (node.args[1],)
        ends = [end for p in parts if isinstance(p, slice) for end in (p.start, p.stop)]
        return any(isinstance(end, fx.Node) and not _is_tensor(end) for end in ends)
    if operation(node) == "narrow":
        return any(isinstance(end, fx.Node) for end in (*node.args[2:], *node.kwargs.values()))
    return False


def _is_of(table: fx.Node, weights: set[fx.Node]) -> bool:
    """Return whether a tensor is made of weights alone."""
    read = {n for n in _made_of(table) if n.op == "placeholder"}
    return bool(read) and read <= weights


def _is_tensor(value: object) -> bool:
    example = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return isinstance(example, torch.Tensor)


def _made_of(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a tensor and the tensors that it is made of; of others only lengths matter."""
    seen, todo = {node}, [node]
    while todo:
        yield (found := todo.pop())
        more = [n for n in found.all_input_nodes if n not in seen and _is_tensor(n)]
        seen.update(more)
        todo += more
