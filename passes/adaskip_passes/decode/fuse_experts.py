"""Inner pass for a decode step: a router chooses in one operator, and experts add to the stream.

Before::                                        After::

    p = softmax(float(scores))                  v, i = choose_experts(scores, softmax, "share")
    v, i = topk(p)                              y = run_experts(x, i, v, ..., residual=r)
    v /= sum(v)
    y = r + run_experts(x, i, v, ...)

The choice of DeepSeek-V3's routers is one of groups: :mod:`grouped_choice`. Experts also add where
a projection comes between: ``r + project(s, w, residual=run_experts(...))`` for shared ones.

What a choice is made of is fused as far as nothing else reads it: a softmax before it, and after it
a division by the sum, or a softmax, and a change of dtype. Legal because the same values are
computed of the same operands; where scores are equal, the first ones are chosen, and values are
rounded once, at the end.

A choice is left alone among more than `MAX_EXPERTS` scores, or of more than `_MOST`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from ..analysis.effects import is_mutation
from ..infra.pass_base import Pass, PassResult
from ..transforms.dead_code import eliminate_dead_code
from .expert_ops import MAX_EXPERTS, MAX_TOKENS
from .grouped_choice import grouped_choice
from .matching import (
    argument,
    calls,
    dtype_of,
    example,
    find_overwritten,
    most_rows,
    only_user,
    operands,
    shape_of,
)
from .projection_ops import project as project  # the operator
from .router_ops import choose_in_groups as choose_in_groups  # the operator

_RUN = torch.ops.adaskip.run_experts.default
_CHOOSE = torch.ops.adaskip.choose_experts.default
_CHOOSE_IN_GROUPS = torch.ops.adaskip.choose_in_groups.default
_PROJECT, _RESIDUAL = torch.ops.adaskip.project.default, 6  # which of its arguments
_MOST = 16
#: Rows of scores of a step; some routers look at groups of experts, of which a token has several.
_MOST_ROWS = MAX_TOKENS * MAX_TOKENS
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FuseExperts(Pass):
    """Pass over the graph of a piece, whose nodes carry their example values.

    Its changes are fused choices, experts that add, and erased nodes.

    Attributes:
        any_rows: Whether choices are fused of as many tokens as a prompt has, and not of a step's
            few alone.

    """

    any_rows: bool = False

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Fuse choices and experts; see :class:`Pass`."""
        graph = graph_module.graph
        overwritten = find_overwritten(graph)
        chosen = [n for n in graph.nodes if calls(n, "topk") and (self.any_rows or _of_few(n))]
        changes = sum(_fuse_groups(graph, n, overwritten) for n in chosen)
        for node in list(graph.nodes):
            if node in chosen and calls(node, "topk"):
                changes += _fuse_choice(graph, node, overwritten)
            elif node.op == "call_function" and node.target is _RUN:
                changes += _fuse_add(graph, node, overwritten)
        return PassResult(graph_module, changes + eliminate_dead_code(graph))


# Choices -----------------------------------------------------------------------------------------


def _fuse_groups(graph: fx.Graph, node: fx.Node, overwritten: set[fx.Node]) -> bool:
    """Make a choice among groups one call; returns whether that was done."""
    found = grouped_choice(node)
    if found is None or not overwritten.isdisjoint((found.logits, found.bias)):
        return False
    shape = shape_of(found.logits)
    if shape is None or shape[-1] > MAX_EXPERTS:
        return False
    users = [user for result in (found.places, found.values) for user in result.users]
    if found.wanted > _MOST or any(is_mutation(u) for u in users if u not in found.writes):
        return False
    with graph.inserting_before(node):
        call = graph.call_function(_CHOOSE_IN_GROUPS, tuple(found[:7]))
        new = [graph.call_function(operator.getitem, (call, i)) for i in range(2)]
    for old, item in zip((found.values, found.places), new, strict=True):
        item.meta["example_value"] = example(old)
        old.replace_all_uses_with(item)
    for old in dict.fromkeys((found.values, *found.writes)):
        graph.erase_node(old)
    return True


def _fuse_choice(graph: fx.Graph, topk: fx.Node, overwritten: set[fx.Node]) -> bool:
    """Make a topk, and what is around it, one call; returns whether that was done."""
    found = _scores_of(topk)
    items = {n.args[1]: n for n in topk.users if calls(n, "getitem")}
    if found is None or found[0] in overwritten or len(items) != len(topk.users):
        return False
    scores, count = found
    values, places = items.get(0), items.get(1)
    after, result, writes = _after(values) if values is not None else ("", None, None)
    users = [u for n in (result, places) if n is not None for u in n.users]
    if any(is_mutation(u) for u in users):
        return False
    logits = _softmaxed(scores, overwritten)
    dtype = dtype_of(result if result is not None else scores)
    arguments = (logits or scores, count, logits is not None, after, dtype)
    with graph.inserting_before(topk):
        call = graph.call_function(_CHOOSE, arguments)
        new = [graph.call_function(operator.getitem, (call, i)) for i in range(2)]
    for old, item in zip((result, places), new, strict=True):
        if old is not None:
            item.meta["example_value"] = example(old)
            old.replace_all_uses_with(item)
    if writes is not None and result is not None:
        if result is not writes:
            graph.erase_node(result)
        graph.erase_node(writes)
    return True


def _scores_of(topk: fx.Node) -> tuple[fx.Node, int] | None:
    """Return what a topk looks at, along the last of its dimensions, and how many it takes."""
    given = dict(zip(("input", "k", "dim", "largest", "sorted"), topk.args, strict=False))
    given |= topk.kwargs
    scores, count = given.pop("input", None), given.pop("k", None)
    if not isinstance(scores, fx.Node):
        return None
    shape, dtype = shape_of(scores), dtype_of(scores)
    if (
        shape is None
        or dtype not in _DTYPES
        or not isinstance(count, int)
        or not 0 < count <= _MOST
    ):
        return None
    usual = given.get("dim", -1) in (-1, len(shape) - 1) and given.get("largest", True) is True
    if not usual or not isinstance(shape[-1], int) or shape[-1] > MAX_EXPERTS:
        return None
    return scores, count


def _of_few(topk: fx.Node) -> bool:
    """Return whether a topk looks at no more rows of scores than a step has."""
    scores = topk.kwargs.get("input", topk.args[0] if topk.args else None)
    shape = shape_of(scores) if isinstance(scores, fx.Node) else None
    rows = most_rows(shape) if shape else None  # (not `numel`, which would settle a symbol)
    return rows is not None and rows <= _MOST_ROWS


def _softmaxed(scores: fx.Node, overwritten: set[fx.Node]) -> fx.Node | None:
    """Return what `scores` are the softmax of, in float32; None if others read them as well."""
    source = argument(scores, "softmax")
    if source is None or not _is_last(scores) or dtype_of(scores) != torch.float32:
        return None
    if len(scores.users) != 1:
        return None
    narrow = argument(source, "float", "to")
    if narrow is not None and dtype_of(source) == torch.float32 and dtype_of(narrow) in _DTYPES:
        source = narrow
    fits = dtype_of(source) in _DTYPES and source not in overwritten
    return source if fits else None


def _after(values: fx.Node) -> tuple[str, fx.Node, fx.Node | None]:
    """Return what is done to values of a choice, the result, and the node that writes them."""
    after, result, writes = "", values, None
    users = list(values.users)
    division = next((u for u in users if calls(u, "itruediv", "truediv", "div")), None)
    if division is not None and len(users) == 2 and division.args[0] is values:
        total = users[1 - users.index(division)]
        if _is_sum(total) and division.args[1] is total and only_user(total) is division:
            after, result = "share", division
            writes = division if is_mutation(division) else None
    elif len(users) == 1 and calls(users[0], "softmax") and _is_last(users[0]):
        after, result = "softmax", users[0]
    narrow = only_user(result)
    if narrow is not None and calls(narrow, "to") and dtype_of(narrow) in _DTYPES:
        result = narrow
    return after, result, writes


def _is_last(node: fx.Node) -> bool:
    """Return whether a softmax is along the last dimension."""
    shape = shape_of(node)
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return shape is not None and dim in (-1, len(shape) - 1)


def _is_sum(node: fx.Node) -> bool:
    """Return whether a node sums the last dimension, and keeps it."""
    given = {**dict(zip(("input", "dim", "keepdim"), node.args, strict=False)), **node.kwargs}
    usual = given.keys() == {"input", "dim", "keepdim"} or given.keys() == {"dim", "keepdim"}
    return calls(node, "sum") and usual and given["dim"] in (-1, (-1,)) and given["keepdim"] is True


# Experts -----------------------------------------------------------------------------------------


def _fuse_add(graph: fx.Graph, run: fx.Node, overwritten: set[fx.Node]) -> bool:
    """Have experts add what the stream is added to them; returns whether that was done."""
    last = _seen(run)
    add = only_user(last)
    if add is None:
        return False
    if run.args[-1] is not None:
        return _fuse_second_add(graph, run, last, add, overwritten)
    if add.target is _PROJECT and add.args[_RESIDUAL] is last:
        return _fuse_add_behind(graph, run, last, add, overwritten)
    other = _added(add, last, overwritten)
    if other is None or dtype_of(other) != dtype_of(run):
        return False
    with graph.inserting_before(add):
        call = graph.call_function(_RUN, (*run.args[:-1], other))
        shaped = graph.call_method("view_as", (call, other))
    call.meta["example_value"] = example(run)
    shaped.meta["example_value"] = example(add)
    add.replace_all_uses_with(shaped)
    _fuse_add(graph, call, overwritten)
    return True


def _fuse_second_add(
    graph: fx.Graph, run: fx.Node, last: fx.Node, add: fx.Node, overwritten: set[fx.Node]
) -> bool:
    """Do that where experts add something already: to that the stream is added before.

    It is something that is made of what shared experts give (Qwen2-MoE, Qwen3-Next), so that to
    add the stream as well costs nothing.
    """
    other, known = _added(add, last, overwritten), run.args[-1]
    if other is None or other.op != "placeholder" or not isinstance(known, fx.Node):
        return False
    if known.op == "placeholder" or dtype_of(known) != dtype_of(other):
        return False
    with graph.inserting_before(run):
        stream = graph.call_method("view_as", (other, known))
        both = graph.call_function(operator.add, (stream, known))
    stream.meta["example_value"] = both.meta["example_value"] = example(known)
    run.args = (*run.args[:-1], both)
    add.replace_all_uses_with(last)
    return True


def _fuse_add_behind(
    graph: fx.Graph, run: fx.Node, last: fx.Node, project: fx.Node, overwritten: set[fx.Node]
) -> bool:
    """Do that where shared experts come between, and add the others to their results.

    What is added must be there before the experts run, as the stream is.
    """
    result = only_user(project)
    add = only_user(result) if result is not None else None
    if result is None or add is None or not calls(result, "getitem"):
        return False
    other = _added(add, result, overwritten)
    if other is None or other.op != "placeholder" or dtype_of(other) != dtype_of(run):
        return False
    run.args = (*run.args[:-1], other)
    add.replace_all_uses_with(result)
    return True


def _seen(node: fx.Node) -> fx.Node:
    """Return the last of the shapes in which alone a node is seen."""
    shapes = "view", "reshape", "view_as"
    while (user := only_user(node)) is not None and argument(user, *shapes) is node:
        node = user
    return node


def _added(add: fx.Node, last: fx.Node, overwritten: set[fx.Node]) -> fx.Node | None:
    """Return what an add adds to `last`, both of the sum's shape and it of the sum's dtype."""
    for one, other in operands(add, "add"):
        same = shape_of(last) == shape_of(other) == shape_of(add)
        same = same and dtype_of(other) == dtype_of(add)
        if one is last and other is not last and same and overwritten.isdisjoint((other, add)):
            return other
    return None
