"""The choice of DeepSeek-V3's routers as transformers writes it, by the topk that it ends with.

::

    scores = sigmoid(logits)
    compared = scores + bias
    groups = topk(compared.view(-1, G, E / G), 2)[0].sum(-1)
    mask = zeros_like(groups).scatter_(1, topk(groups, kept)[1], 1)
    masked = compared.masked_fill(~mask.unsqueeze(-1).expand(...).reshape(-1, E).bool(), -inf)
    places = topk(masked, count)[1]
    values = scores.gather(1, places)
    values = values / (values.sum(-1, keepdim=True) + 1e-20) * factor
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import fx

from .matching import argument, by_number, calls, dtype_of, only_user, shape_of


class GroupedChoice(NamedTuple):
    """What a choice reads and how it is made: see :func:`router_ops.choose_in_groups`.

    `places` and `values` are its results, `writes` the nodes among it that write in place.
    """

    logits: fx.Node
    bias: fx.Node
    wanted: int
    groups: int
    kept: int
    share: bool
    factor: float
    places: fx.Node
    values: fx.Node
    writes: tuple[fx.Node, ...]


class _Groups(NamedTuple):
    compared: fx.Node
    groups: int
    kept: int
    scatter: fx.Node


def grouped_choice(topk: fx.Node) -> GroupedChoice | None:
    """Return the choice that a topk ends, if that is what it does."""
    masked, count = _topk(topk)
    places = only_user(topk)
    if masked is None or places is None or not calls(places, "getitem") or places.args[1] != 1:
        return None
    found = _groups_of(masked)
    if found is None or not calls(found.compared, "add") or found.compared.kwargs:
        return None
    scores, bias = found.compared.args[:2]
    if not isinstance(scores, fx.Node) or not isinstance(bias, fx.Node):
        return None
    logits, shape = argument(scores, "sigmoid"), shape_of(scores)
    whole = shape is not None and len(shape) == 2 and shape_of(bias) == shape[1:]
    float32 = dtype_of(scores) == torch.float32 and logits is not None
    if logits is None or shape is None or not whole or not float32:
        return None
    if dtype_of(logits) != torch.float32 or count > found.kept * (shape[1] // found.groups):
        return None
    after = _after(scores, places)
    if after is None:
        return None
    values, share, factor, writes = after
    sizes = count, found.groups, found.kept
    return GroupedChoice(
        logits, bias, *sizes, share, factor, places, values, (*writes, found.scatter)
    )


def _topk(node: fx.Node) -> tuple[fx.Node | None, int]:
    """Return what a topk looks at along the last dimension, and how many it takes; else nothing."""
    names = ("input", "k", "dim", "largest", "sorted")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    scores, count = given.get("input"), given.get("k")
    shape = shape_of(scores) if isinstance(scores, fx.Node) else None
    if not calls(node, "topk") or shape is None or not isinstance(count, int):
        return None, 0
    usual = given.get("dim", -1) in (-1, len(shape) - 1) and given.get("largest", True) is True
    return (scores, count) if usual and isinstance(scores, fx.Node) else (None, 0)


def _groups_of(masked: fx.Node) -> _Groups | None:
    """Return how experts are left out whose group is not among the best, if that is all it is."""
    compared = argument(masked, "masked_fill")
    if compared is None or masked.kwargs or masked.args[2:] != (-math.inf,):
        return None
    chain, node = [masked], masked.args[1]
    for names in (("invert",), ("bool",), ("reshape",), ("expand",), ("unsqueeze",)):
        inner = argument(node, *names) if isinstance(node, fx.Node) else None
        if inner is None or not isinstance(node, fx.Node) or only_user(node) is not chain[-1]:
            return None
        chain.append(node)
        node = inner
    assert isinstance(node, fx.Node)
    unsqueeze, spread = chain[-1], shape_of(chain[-2])
    scatter = next((user for user in node.users if calls(user, "scatter_")), None)
    if not calls(node, "zeros_like") or scatter is None or scatter.users:
        return None
    if set(node.users) != {scatter, unsqueeze} or unsqueeze.args[1:] != (-1,):
        return None
    indices = scatter.args[2] if len(scatter.args) == 4 else None
    topk = argument(indices, "getitem") if isinstance(indices, fx.Node) else None
    if topk is None or scatter.args[1::2] != (1, 1) or indices.args[1] != 1:  # type: ignore[union-attr]
        return None
    totals, kept = _topk(topk)
    groups = _groups_compared(totals, compared) if totals is not None else None
    if groups is None or node.args[0] is not totals or spread is None:
        return None
    size = shape_of(compared)
    fits = size is not None and tuple(spread[1:]) == (groups, size[1] // groups)
    return _Groups(compared, groups, kept, scatter) if fits else None


def _groups_compared(totals: fx.Node, compared: fx.Node) -> int | None:
    """Return of how many groups `totals` are the sums of the two best."""
    given = {**dict(zip(("input", "dim"), totals.args, strict=False)), **totals.kwargs}
    best = given.pop("input", None)
    if not calls(totals, "sum") or given != {"dim": -1} or not isinstance(best, fx.Node):
        return None
    topk = argument(best, "getitem")
    by_group, two = _topk(topk) if topk is not None and best.args[1] == 0 else (None, 0)
    if by_group is None or two != 2 or argument(by_group, "view") is not compared:
        return None
    shape, whole = shape_of(by_group), shape_of(compared)
    if shape is None or whole is None or len(shape) != 3 or shape[1] * shape[2] != whole[-1]:
        return None
    return int(shape[1])


def _after(
    scores: fx.Node, places: fx.Node
) -> tuple[fx.Node, bool, float, tuple[fx.Node, ...]] | None:
    """Return the values of a choice, whether they are shares, their factor, and what writes."""
    gathers = [user for user in places.users if calls(user, "gather")]
    values = gathers[0] if len(gathers) == 1 else None
    if values is None or values.args != (scores, 1, places) or values.kwargs:
        return None
    share, writes = False, tuple[fx.Node, ...]()
    division = next((u for u in values.users if calls(u, "truediv", "itruediv", "div")), None)
    if division is not None:
        if not _is_share(division, values):
            return None
        share, writes = True, (division,) if calls(division, "itruediv") else ()
        values = division
    product = only_user(values)
    scaled, factor = by_number(product, "mul") if product is not None else (None, 1.0)
    if product is not None and scaled is values:
        return product, share, factor, writes
    return values, share, 1.0, writes


def _is_share(division: fx.Node, values: fx.Node) -> bool:
    """Return whether a node divides values by their sum, and nothing else reads them."""
    total = division.args[1] if len(division.args) == 2 and not division.kwargs else None
    if not isinstance(total, fx.Node) or division.args[0] is not values:
        return False
    whole, least = by_number(total, "add")
    if whole is None or least != 1e-20 or argument(whole, "sum") is not values:
        return False
    given = {**dict(zip(("input", "dim", "keepdim"), whole.args, strict=False)), **whole.kwargs}
    along = given == {"input": values, "dim": -1, "keepdim": True}
    alone = only_user(total) is division and only_user(whole) is total
    return along and alone and set(values.users) == {whole, division}
