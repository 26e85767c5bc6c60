"""Norms as transformers writes them, by the nodes that they end with.

RMS norms: ``weight * (x32 * rsqrt(mean(x32 ** 2) + eps)).to(dtype)``, and Gemma's ``(x32 *
rsqrt(mean(x32 ** 2) + eps) * (1 + weight32)).to(dtype)``. (OLMo 2 and GPT-OSS cast as late, without
the 1.) Mamba 2's norm is of something in float32, which it sees as groups; those of Mamba are of a
stream in float32, which is rounded first.

Layer norms: torch's function, and Cohere's, where x32 is less its mean and there is no bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from .matching import argument, calls, dtype_of, example, operands, shape_of

_HALF = (torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """What a norm reads and how it computes: see :func:`projection_ops.normalize`.

    Without a weight it is none, and gives x.
    """

    x: fx.Node
    weight: fx.Node | None = None
    eps: float = 0.0
    offset: float = 0.0
    shift: fx.Node | None = None
    centered: bool = False

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What it reads."""
        return tuple(n for n in (self.x, self.weight, self.shift) if n is not None)


def norm_of(node: fx.Node) -> Norm | None:
    """Return the norm that made `node`; None if none did.

    The input may be float32 where the weight is half as wide, also where it was rounded before.
    """
    node, shape = _unwrapped(node), shape_of(node)
    found = _layer_norm(node) if calls(node, "layer_norm") else _written_out(node)
    if found is None or found.weight is None or dtype_of(found.weight) != dtype_of(node):
        return None
    x = _before_rounding(_unwrapped(found.x))
    wider = dtype_of(x) == torch.float32 and dtype_of(node) in _HALF
    fits = (wider or dtype_of(x) == dtype_of(node)) and shape_of(x) == shape
    return found._replace(x=x) if fits else None


def _layer_norm(node: fx.Node) -> Norm | None:
    """Return what torch's function is called with, if it has a weight for each number."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, weight, shift, eps = (given.get(name) for name in ("input", "weight", "bias", "eps"))
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    parameters = [n for n in (weight, shift) if isinstance(n, fx.Node)]
    if any(n.op != "placeholder" or not _is_vector(n, node) for n in parameters):
        return None
    if any(dtype_of(n) != dtype_of(weight) for n in parameters):
        return None
    # (the weight is a vector of the last dimension's size, so that is what is normalized)
    return Norm(
        x,
        weight,
        float(eps) if isinstance(eps, int | float) else 1e-5,
        shift=shift if isinstance(shift, fx.Node) else None,
        centered=True,
    )


def _written_out(node: fx.Node) -> Norm | None:
    narrow = argument(node, "to", "type_as")
    for factor, inner in operands(narrow if narrow is not None else node, "mul"):
        weight, offset = _factor(factor)
        if weight is None or weight.op != "placeholder" or not _is_vector(weight, node):
            continue
        cast = argument(inner, "to", "type_as") if narrow is None else None
        normed = _unwrapped(cast if cast is not None else inner)
        for wide, scale in operands(normed, "mul"):
            found = _normalized(wide, scale)
            if found is None:
                continue
            x, eps = found
            whole = _before_its_mean(x)
            return Norm(whole or x, weight, eps, offset, centered=whole is not None)
    return None


def _before_its_mean(node: fx.Node) -> fx.Node | None:
    """Return x of ``x32 - mean(x32)``; None if `node` is something else."""
    if not calls(node, "sub") or len(node.args) != 2 or node.kwargs:
        return None
    wide, mean = node.args
    if not isinstance(wide, fx.Node) or not isinstance(mean, fx.Node):
        return None
    if not _mean_of_last(mean) or mean.args[:1] != (wide,) or dtype_of(wide) != torch.float32:
        return None
    source = argument(wide, "to", "float")
    return source if source is not None else wide


def _before_rounding(node: fx.Node) -> fx.Node:
    """Return what was rounded to half its width, if a node is that."""
    inner = argument(node, "to", "type_as")
    rounded = inner is not None and dtype_of(inner) == torch.float32 and dtype_of(node) in _HALF
    return _unwrapped(inner) if inner is not None and rounded else node


def _unwrapped(node: fx.Node) -> fx.Node:
    """Return what a node is without casts that change nothing, and without other leading sizes."""
    while (inner := argument(node, "to", "type_as", "view", "reshape")) is not None:
        own, other = example(node), example(inner)
        if own is None or other is None or (own.dtype, own.device) != (other.dtype, other.device):
            break
        if own.shape[-1] != other.shape[-1]:
            break
        node = inner
    return node


def _factor(node: fx.Node) -> tuple[fx.Node | None, float]:
    """Return the weight that a norm multiplies by, and what is added to it before in float32."""
    if not calls(node, "add"):
        narrow = argument(node, "to", "float") if dtype_of(node) == torch.float32 else None
        return (narrow if narrow is not None else node), 0.0
    if len(node.args) != 2 or node.kwargs or dtype_of(node) != torch.float32:
        return None, 0.0
    wide, offset = node.args if isinstance(node.args[0], fx.Node) else node.args[::-1]
    if not isinstance(wide, fx.Node) or not isinstance(offset, int | float) or not offset:
        return None, 0.0
    weight = argument(wide, "to", "float")
    return (weight if weight is not None else wide), float(offset)


def _normalized(wide: fx.Node, factor: fx.Node) -> tuple[fx.Node, float] | None:
    """Return x and eps of ``x32 * rsqrt(mean(x32 ** 2) + eps)``; None if it is something else."""
    inner = argument(factor, "rsqrt")
    if inner is None or not calls(inner, "add") or len(inner.args) != 2 or inner.kwargs:
        return None
    mean, eps = inner.args
    if not isinstance(mean, fx.Node) or not isinstance(eps, float) or not _mean_of_last(mean):
        return None
    power = mean.args[0]
    if not isinstance(power, fx.Node) or not calls(power, "pow") or power.args[1:] != (2,):
        return None
    if power.kwargs or dtype_of(wide) != torch.float32:
        return None
    if power.args[0] is not wide and not _are_the_same(power.args[0], wide):
        return None
    source = argument(wide, "to", "float")
    return (source if source is not None else wide), eps


def _are_the_same(one: object, other: fx.Node) -> bool:
    """Return whether two nodes are the same difference (Cohere subtracts the mean twice)."""
    if not isinstance(one, fx.Node) or not calls(one, "sub") or not calls(other, "sub"):
        return False
    return one.args == other.args and one.kwargs == other.kwargs


def _mean_of_last(node: fx.Node) -> bool:
    arguments = {**dict(zip(("input", "dim", "keepdim"), node.args, strict=False)), **node.kwargs}
    return (
        calls(node, "mean")
        and arguments.keys() <= {"input", "dim", "keepdim"}
        and arguments.get("dim") in (-1, (-1,), [-1])
        and arguments.get("keepdim") is True
    )


def _is_vector(weight: fx.Node, like: fx.Node) -> bool:
    shape, whole = shape_of(weight), shape_of(like)
    return shape is not None and whole is not None and tuple(shape) == (whole[-1],)
