"""Whether rotary embeddings whose frequencies depend on the length are what they were.

Their own forward exchanges frequencies from call to call, so the look at a model's state leaves
these modules out. What a user may change in them is compared here, and refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adaskip_passes.tracing.module_walk import HOOKS

from . import rotary
from .state import ChangedError

_APART = frozenset({"_parameters", "_buffers", "_modules", "training"})
_ABSENT = object()


class RotaryState:
    """What such modules of some models held at the last look; nothing to do for other models."""

    def __init__(self, *models: nn.Module) -> None:
        """Take what is there now for what was captured."""
        self._modules = [module for model in models for module in rotary.by_length(model)]
        self._held = [_held(module) for module in self._modules]
        for kept in (v for held in self._held for v in held.values() if isinstance(v, _Kept)):
            kept.values()  # before they can be changed in place

    def check(self) -> None:
        """Refuse a change; tensors may be in another place, or have another dtype.

        Raises:
            ChangedError: there is one.
        """
        for number, module in enumerate(self._modules):
            before, now = self._held[number], _held(module)
            for name in {**before, **now}:
                if not _same(before.get(name, _ABSENT), now.get(name, _ABSENT)):
                    raise ChangedError(
                        f"{name} of a {type(module).__name__}, whose frequencies depend on the "
                        "length, was changed after the model was compiled; undo it, or compile "
                        "again"
                    )
            self._held[number] = now


def _held(module: Any) -> dict[str, Any]:
    """Return what a module holds by name, but for what its own forward writes."""
    written = rotary.written(module)
    attributes = {n: v for n, v in vars(module).items() if n not in _APART and n not in written}
    for kind in HOOKS:
        attributes[kind] = (*vars(module)[kind].values(),)
    tensors = {n: t for n, t in module._buffers.items() if n not in written}
    found = {**attributes, **tensors}
    return {n: _Kept(v) if isinstance(v, torch.Tensor) else v for n, v in found.items()}


class _Kept:
    """A tensor, and the values that it has."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._version = None if tensor.is_inference() else tensor._version
        self._values: torch.Tensor | None = None

    def is_as(self, before: _Kept) -> bool:
        """Return whether it has the values of `before`, which knows them."""
        known = before.values()
        if before._tensor is self._tensor and before._version == self._version is not None:
            self._values = known
            return True
        return torch.equal(known.to(self._tensor.dtype), self.values())

    def values(self) -> torch.Tensor:
        """Return its values, on the CPU; read when they are first asked for."""
        if self._values is None:
            self._values = self._tensor.detach().cpu().clone()
        return self._values


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, _Kept) and isinstance(now, _Kept):
        return now.is_as(before)
    if before is now:
        return True
    plain = isinstance(now, str | int | float | bool | dict | tuple) and type(before) is type(now)
    return plain and bool(before == now)
