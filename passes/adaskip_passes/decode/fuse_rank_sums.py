"""Inner pass for a decode step on several ranks: a sum over ranks and a residual as one operator.

Before::                                        After::

    total = wait_tensor(all_reduce(x, "sum"))   h = sum_over_ranks(x, residual, group)
    x.copy_(total)
    h = residual + x

Legal because nothing but the all-reduce reads `x` before the copy, under this name or another, and
what reads it later reads the sum. The operator stands where the residual is added, and adds it
before it rounds the sum, so the pass preserves results to rounding. Any other sum stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..analysis.effects import storage_root
from ..infra.pass_base import Pass, PassResult
from ..transforms.dead_code import eliminate_dead_code
from .matching import calls, dtype_of, example, only_user
from .rank_sums import sum_over_ranks as sum_over_ranks  # the operator


@dataclass(frozen=True)
class FuseRankSums(Pass):
    """Pass over the graph of a piece, whose nodes carry their example values.

    Its changes are sums that became operators, and erased nodes.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Fuse the sums; see :class:`Pass`."""
        graph = graph_module.graph
        fused = sum(_fuse(graph, node) for node in list(graph.nodes) if calls(node, "all_reduce"))
        erased = eliminate_dead_code(graph)
        return PassResult(graph_module, fused + erased)


def _fuse(graph: fx.Graph, reduced: fx.Node) -> bool:
    found = _copied(reduced)
    if found is None:
        return False
    x, copy = found
    order = {node: i for i, node in enumerate(graph.nodes)}
    later = [user for user in x.users if user not in (reduced, copy)]
    if any(order[user] < order[copy] for user in later):
        return False
    added = _residual(x, later)
    at, residual = added if added is not None else (copy, None)
    with graph.inserting_before(at):
        call = graph.call_function(
            torch.ops.adaskip.sum_over_ranks.default, (x, residual, reduced.args[2])
        )
    call.meta["example_value"] = x.meta["example_value"]
    if added is not None:
        at.replace_all_uses_with(call)
        graph.erase_node(at)
    else:
        for user in later:
            user.replace_input_with(x, call)
    total = copy.args[1]
    graph.erase_node(copy)
    for node in (total, reduced):
        assert isinstance(node, fx.Node)
        graph.erase_node(node)
    return True


def _copied(reduced: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return what an all-reduce sums, and the copy of the sum into it, if that is all it does."""
    if len(reduced.args) != 3 or reduced.args[1] != "sum" or reduced.kwargs:
        return None
    x, total = reduced.args[0], only_user(reduced)
    if not isinstance(x, fx.Node) or total is None or not calls(total, "wait_tensor"):
        return None
    copy, dtype = only_user(total), dtype_of(x)
    if copy is None or not calls(copy, "copy_") or copy.args != (x, total) or copy.users:
        return None
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or not _is_its_own(x):
        return None
    return x, copy


def _is_its_own(x: fx.Node) -> bool:
    """Return whether nobody sees what is written to a value but those who read it by its name."""
    root = storage_root(x)
    while x is not root:
        base = x.all_input_nodes[0]
        if only_user(base) is not x:
            return False
        x = base
    return root.op != "placeholder"


def _residual(x: fx.Node, later: list[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """Return the add that alone reads a sum, and what it adds of the same shape and dtype."""
    if len(later) != 1 or not calls(later[0], "add"):
        return None
    add = later[0]
    if len(add.args) != 2 or add.kwargs:
        return None
    other = add.args[1] if add.args[0] is x else add.args[0]
    mine, theirs = example(x), example(other)
    if not isinstance(other, fx.Node) or other is x or mine is None or theirs is None:
        return None
    same = mine.shape == theirs.shape and mine.dtype == theirs.dtype
    return (add, other) if same else None
