"""What a graph depends on of tensors: their layout, and which of them are the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def describe_tensor(tensor: Any) -> Any:
    """Return what a graph depends on of a tensor: everything but its values."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor)
    kind: type = nn.Parameter if isinstance(tensor, nn.Parameter) else type(tensor)
    plain = (kind, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    flatten: Callable[[], tuple[list[str], Any]] | None
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return plain
    names, context = flatten()
    inner = tuple((name, describe_tensor(getattr(tensor, name))) for name in names)
    return (*plain, type(tensor), str(context), inner)


def sharing(tensors: Iterable[Any]) -> tuple[int, ...]:
    """Return which tensors are the same object: for each the place of its first appearance."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(t), i) for i, t in enumerate(tensors))
