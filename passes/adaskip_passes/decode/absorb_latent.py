"""Pass over a captured step: attention reads a latent cache, and not keys and values made of it.

Before::                                            After::

    store(latents, c, position)                         store(latents, c, position)
    store(rotated, r, position)                         store(rotated, r, position)
    k_v = linear(latents, w).view(b, room, h, n + d)    asked = cat(into_latent(q[:n], w), q[n:])
    k, values = k_v.transpose(1, 2).split([n, d])       mixed = attend_latent(asked, latents,
    keys = cat(k, rotated.expand(h))                                          rotated, bounds)
    y = attend(q, keys, values, bounds)                 y = out_of_latent(mixed, w)

(The keys may be written into an empty tensor instead of the ``cat``, as transformers does.) Legal
because ``q . (u c) = (u' q) . c``, and a sum of ``v c`` by shares is ``v`` of the sum of the c: the
same values are computed in another order, so the pass preserves results to rounding. It reads of
the cache what the bounds say, where the code before makes keys of all that there is room for.

Where anything else reads those keys and values, or they have a bias, groups or another form, they
stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from ..infra.pass_base import Pass, PassResult
from ..transforms.dead_code import eliminate_dead_code
from .latent_ops import into_latent, out_of_latent
from .matching import argument, calls, example, find_overwritten, only_user, shape_of, two_parts

_ATTEND = torch.ops.adaskip.attend.default
_ATTEND_LATENT = torch.ops.adaskip.attend_latent.default


class _Expanded(NamedTuple):
    """Where keys and values are made: of which inputs, and the writes that put keys together."""

    latents: fx.Node
    rotated: fx.Node
    weight: fx.Node
    writes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class AbsorbLatent(Pass):
    """Pass over a captured graph, under its fake mode. Its changes are attentions."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Have attention read latents; see :class:`Pass`."""
        graph, changes = graph_module.graph, 0
        overwritten: set[fx.Node] | None = None
        for node in graph.find_nodes(op="call_function", target=_ATTEND):
            found = _expanded(node)
            if found is None:
                continue
            overwritten = find_overwritten(graph) if overwritten is None else overwritten
            if found.weight in overwritten:
                continue
            _absorb(node, found)
            changes += 1
        if changes:
            eliminate_dead_code(graph)
        return PassResult(graph_module, changes)


def _expanded(attend: fx.Node) -> _Expanded | None:
    """Return what the keys and values of an attention are made of; None if it is another thing."""
    query, key, value = attend.args[:3]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    parts = _parts_of(key, attend)
    if parts is None or not isinstance(value, fx.Node) or only_user(value) is not attend:
        return None
    own, shared, writes = parts
    together = argument(own, "getitem")
    if together is None or argument(value, "getitem") is not together:
        return None
    if own.args[1] != 0 or value.args[1] != 1 or len(together.users) != 2:
        return None
    whole, rotated = argument(together, "split"), argument(shared, "expand")
    if whole is None or rotated is None or rotated.op != "placeholder":
        return None
    linear = _heads_of(whole)
    if linear is None or len(linear.args) < 2:
        return None
    latents, weight, *bias = linear.args
    if any(b is not None for b in (*bias, *linear.kwargs.values())):
        return None
    if not all(isinstance(n, fx.Node) and n.op == "placeholder" for n in (latents, weight)):
        return None
    found = _Expanded(latents, rotated, weight, writes)  # type: ignore[arg-type]
    return found if _fits(query, own, value, found) else None


def _parts_of(key: fx.Node, attend: fx.Node) -> tuple[fx.Node, fx.Node, tuple[fx.Node, ...]] | None:
    """Return the two parts of keys along a head, and the writes that put them together."""
    parts = two_parts(key) if only_user(key) is attend else None
    if parts is not None:
        return (*parts, ())
    if not calls(key, "new_empty", "empty", "empty_like") or len(key.users) != 3:
        return None
    *slices, last = key.users
    if last is not attend or not all(calls(s, "getitem") for s in slices):
        return None
    copies = [only_user(s) for s in slices]
    if any(c is None or not calls(c, "copy_") or len(c.args) != 2 or c.users for c in copies):
        return None
    own, shared = (c.args[1] for c in copies if c is not None)
    size = shape_of(own) if isinstance(own, fx.Node) else None
    if size is None or not isinstance(own, fx.Node) or not isinstance(shared, fx.Node):
        return None
    first, second = (s.args[1] for s in slices)
    if first != (Ellipsis, slice(None, size[-1], None)):
        return None
    if second != (Ellipsis, slice(size[-1], None, None)):
        return None
    return own, shared, tuple(c for c in copies if c is not None)


def _heads_of(whole: fx.Node) -> fx.Node | None:
    """Return the projection whose outputs are heads of `whole`, [B, H, room, N + D_v]."""
    view = argument(whole, "transpose")
    linear = argument(view, "view", "reshape") if view is not None else None
    if view is None or linear is None or tuple(whole.args[1:]) != (1, 2) or whole.kwargs:
        return None
    return linear if calls(linear, "linear") else None


def _fits(query: fx.Node, own: fx.Node, value: fx.Node, found: _Expanded) -> bool:
    """Return whether all shapes are those of latent attention, in plain tensors of one dtype."""
    tensors = [example(n) for n in (query, own, value, *found[:3])]
    if any(t is None or t.dtype != tensors[0].dtype for t in tensors):  # type: ignore[union-attr]
        return False
    q, k, v, latents, rotated, weight = (tuple(t.shape) for t in tensors if t is not None)
    if len(q) != 4 or len(weight) != 2 or hasattr(tensors[5], "__tensor_flatten__"):
        return False
    batch, heads, _, dim = q
    room, rank = latents[2:]
    return (
        latents[:2] == rotated[:2] == (batch, 1)
        and rotated[2] == room
        and k[:3] == v[:3] == (batch, heads, room)
        and dim == k[3] + rotated[3]
        and weight == (heads * (k[3] + v[3]), rank)
    )


def _absorb(attend: fx.Node, found: _Expanded) -> None:
    """Put attention to the latents in the place of attention to what is made of them."""
    graph, (query, _, _, *rest) = attend.graph, attend.args
    asked, rotated = shape_of(query), shape_of(found.rotated)  # type: ignore[arg-type]
    assert asked is not None
    assert rotated is not None
    dim = asked[3] - rotated[3]
    with graph.inserting_before(attend):
        own, turned = _halves(attend, query, dim)  # type: ignore[arg-type]
        own = _call(attend, into_latent, own, found.weight)
        asked_of = _call(attend, torch.cat, (own, turned), -1)
        mixed = _call(attend, _ATTEND_LATENT, asked_of, found.latents, found.rotated, *rest)
        result = _call(attend, out_of_latent, mixed, found.weight, dim)
    attend.replace_all_uses_with(result)
    graph.erase_node(attend)
    for write in found.writes:
        graph.erase_node(write)


def _halves(attend: fx.Node, query: fx.Node, dim: int) -> tuple[fx.Node, fx.Node]:
    """Return queries up to `dim` and from there on, as they were before they were put together."""
    parts = two_parts(query)
    if parts is not None and (size := shape_of(parts[0])) is not None and size[-1] == dim:
        return parts
    first = _call(attend, operator.getitem, query, (..., slice(None, dim)))
    return first, _call(attend, operator.getitem, query, (..., slice(dim, None)))


def _call(attend: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Add a call to the attention's graph, of its module, with an example value."""
    node = attend.graph.call_function(target, args)
    values = fx.map_arg(args, lambda n: n.meta["example_value"])
    node.meta = {**attend.meta, "example_value": target(*values)}
    return node
