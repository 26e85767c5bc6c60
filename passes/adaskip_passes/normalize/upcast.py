"""Write a stream that is wider than its embedding in the wider dtype from the start.

Mamba keeps the residual stream of a bfloat16 model in float32, from the first add on. Before and
after::

    x = embedding(ids)                    e = embedding(ids)
                                          x = widened(e, float32)
    n = norm(x)                           n = norm(x.to(bfloat16))
    y = x.to(float32) + mixer(n)          y = x.to(float32) + mixer(n)

Then the first sublayer takes the kind of stream that it gives, and can be left out as any other.

Legal because a wider float holds every value of a narrower one, so that all casts give what they
gave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..analysis.effects import operation
from ..analysis.residual_adds import ancestors_of, is_add, residual_of
from ..infra.pass_base import Pass, PassResult


def widened(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in a wider dtype, not by a ``to``, which counts as a view of the stream.

    Args:
        x: The tensor.
        dtype: The wider dtype.

    """
    return x.to(dtype)


@dataclass(frozen=True)
class Upcast(Pass):
    """Pass over a captured graph: widen what the stream begins with.

    An add in a wider dtype inside of a branch is another thing: no stream goes on from it. Its
    changes are 1 where the embedding was narrower than the stream.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Widen the embedding; see :class:`Pass`."""
        return PassResult(graph_module, int(_widen(graph_module.graph)))


def _widen(graph: fx.Graph) -> bool:
    adds = [node for node in graph.nodes if is_add(node) and _widens(node)]
    if not adds:
        return False
    order = {node: i for i, node in enumerate(graph.nodes)}
    ancestors = ancestors_of(graph)
    residuals = {n: r for n in graph.nodes if (r := residual_of(n, order, ancestors))}
    continued = {r.stream for r in residuals.values()}
    for node in adds:
        start = residuals[node].stream if node in residuals and node in continued else None
        if start is not None and not is_add(start) and _widens(node, start):
            narrow, wide = _dtype(start), _dtype(node)
            assert isinstance(wide, torch.dtype)
            _write(graph, start, narrow, wide)
            return True
    return False


def _write(graph: fx.Graph, start: fx.Node, narrow: torch.dtype | None, wide: torch.dtype) -> None:
    users = list(start.users)
    example = start.meta["example_value"]
    with graph.inserting_after(start):
        x = graph.call_function(widened, (start, wide))
    x.meta = {**start.meta, "example_value": example.to(wide)}
    others = [user for user in users if not _casts(user)]
    for user in users:
        if user not in others:
            user.replace_input_with(start, x)
    if others:
        with graph.inserting_after(x):
            back = graph.call_method("to", (x, narrow))
        back.meta = dict(start.meta)
        for user in others:
            user.replace_input_with(start, back)


def _widens(add: fx.Node, stream: fx.Node | None = None) -> bool:
    """Return whether a narrower operand of an add is cast for it.

    Args:
        add: The add.
        stream: Ask of this node whether it is the narrower one, and not of the operands.

    """
    wide = _dtype(add)
    sources = [stream] if stream is not None else _cast_for(add)
    return wide is torch.float32 and any(
        _dtype(s) in (torch.bfloat16, torch.float16) for s in sources
    )


def _cast_for(add: fx.Node) -> list[fx.Node]:
    casts = (a for a in add.all_input_nodes if operation(a) in ("to", "float") and a.args)
    return [s for c in casts if isinstance(s := c.args[0], fx.Node)]


def _casts(node: fx.Node) -> bool:
    """Return whether a node converts to a dtype that it names."""
    if node.op != "call_method" or operation(node) not in ("to", "float"):
        return False
    named = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)]
    return operation(node) == "float" or len(named) == 1


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("example_value")
    return value.dtype if isinstance(value, torch.Tensor) else None
