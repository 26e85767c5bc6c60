"""Link an outer graph: from calls of pieces to something that runs.

Two ways, with equal results. `link` calls pieces that were compiled before, which takes
milliseconds; `fuse` writes the pieces back into one flat graph for a compiler that wants the whole.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import fx

from .outline import Piece, piece_of

Compiled = Callable[..., Any]


def link(outer: fx.GraphModule, compiled: Callable[[Piece], Compiled]) -> Compiled:
    """A function of the outer graph's placeholders, in order, that calls compiled pieces.

    Args:
        outer: an outer graph, as the passes left it.
        compiled: gives the callable of a piece.

    Returns:
        A function that returns what the outer graph returns (a tuple).
    """
    targets: dict[str, Compiled] = {}
    for node in outer.graph.find_nodes(op="call_module"):
        piece = piece_of(node)
        assert piece is not None
        targets[str(node.target)] = compiled(piece)
    code = outer.graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<adaskip program>", "exec"), scope)
    program: Compiled = types.MethodType(scope["forward"], types.SimpleNamespace(**targets))
    return program


def fuse(outer: fx.GraphModule) -> fx.GraphModule:
    """The flat graph that an outer graph stands for.

    Before::                                  After::

        x_1 = self.layers_0_ffn(x, w, ...)        h = linear(x, w)
                                                  x_1 = x + h

    For an outer graph that no pass has changed this is the captured graph, with the same text.
    Legal because a call and its body are the same computation.
    """
    flat = fx.Graph()
    root = fx.GraphModule(outer, flat)
    value: dict[fx.Node, Any] = {}
    for node in outer.graph.nodes:
        piece = piece_of(node) if node.op == "call_module" else None
        if piece is not None:
            value[node] = _inline(flat, root, piece, [value[a] for a in node.all_input_nodes])
        elif node.op == "call_function" and isinstance(value.get(node.all_input_nodes[0]), tuple):
            value[node] = value[node.all_input_nodes[0]][node.args[1]]
        else:
            value[node] = flat.node_copy(node, lambda n: value[n])
    return fx.GraphModule(root, flat, "Fused")


def _inline(flat: fx.Graph, root: fx.GraphModule, piece: Piece, arguments: list[fx.Node]) -> Any:
    """Copy a piece's nodes into `flat`; returns the node, or tuple of nodes, that it returns."""
    inner = piece.module.graph
    copies = dict(zip(inner.find_nodes(op="placeholder"), arguments, strict=True))
    for node in inner.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            _adopt(root, piece.module, str(node.target))
        copies[node] = flat.node_copy(node, lambda n: copies[n])
    (result,) = inner.output_node().args
    return fx.map_arg(result, lambda n: copies[n])


def _adopt(root: fx.GraphModule, owner: fx.GraphModule, target: str) -> None:
    """Make an attribute of a piece an attribute of the flat module."""
    value: Any = owner
    for part in target.split("."):
        value = getattr(value, part)
    if "." not in target and not hasattr(root, target):
        setattr(root, target, value)
