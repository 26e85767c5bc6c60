"""Comparisons of two objects: whether code that reads them reads the same of both."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from adaskip_passes.tracing.tensor_layout import describe_tensor

Tensors: TypeAlias = list[torch.Tensor | None]


def same_tensors(first: Tensors, second: Tensors) -> bool:
    """Return whether two lists hold the same tensors, each by identity."""
    return len(first) == len(second) and all(map(operator.is_, first, second))


def alike(first: Any, second: Any) -> bool:
    """Return whether graphs of both are the same: the values of tensors do not matter."""
    return equal(first, second, lambda a, b: bool(describe_tensor(a) == describe_tensor(b)))


def equal(
    first: Any,
    second: Any,
    tensors: Callable[[Any, Any], bool] = operator.is_,
    above: frozenset[tuple[int, int]] = frozenset(),
) -> bool:
    """Return whether code reads the same of both; modules may be two that hold the same.

    Args:
        first: any object.
        second: the object to compare it with.
        tensors: tells whether two tensors are the same.
        above: pairs that hold these two, which a module may refer back to.
    """
    pair = id(first), id(second)
    if first is second or pair in above:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return tensors(first, second)
    held = (vars(first), vars(second)) if isinstance(first, nn.Module) else (first, second)
    if isinstance(held[0], dict):
        if held[0].keys() != held[1].keys():
            return False
        held = [*held[0].values()], [held[1][key] for key in held[0]]
    if isinstance(held[0], list | tuple):
        within = above | {pair}
        return len(held[0]) == len(held[1]) and all(
            equal(a, b, tensors, within) for a, b in zip(*held, strict=True)
        )
    try:
        return bool(first == second)
    except Exception:
        return False
