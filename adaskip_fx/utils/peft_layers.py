"""Layers of peft's in a model: where they are, what they were put around, and how they are set.

Nothing of peft is imported; its layers are told by the module that their class is defined in.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

#: What peft's layers call the module that they were put around.
BASES = ("base_layer", "original_module", "model")
#: Dictionaries of a module's tensors.
TENSORS = ("_parameters", "_buffers")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, bytes, type(None))


def is_adapter(kind: type) -> bool:
    """Return whether modules of a class are layers of peft's."""
    return any(base.__module__.partition(".")[0] == "peft" for base in kind.__mro__)


def outermost(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Give the layers of peft's in a tree with their paths, but none that is within another."""
    if "peft" not in sys.modules:
        return
    for name, child in module._modules.items():
        if child is None:
            continue
        there = f"{path}.{name}" if path else name
        if is_adapter(type(child)):
            yield there, child
        else:
            yield from outermost(child, there)


def base_of(module: nn.Module) -> nn.Module:
    """Return the module that layers of peft's were put around; any other is its own."""
    while is_adapter(type(module)):
        bases = (module._modules.get(name) for name in BASES)
        inner = next((b for b in bases if b is not None), None)
        if inner is None:
            break
        module = inner
    return module


def runs_adapters(layer: nn.Module) -> bool:
    """Return whether a layer of peft's computes something besides what it was put around."""
    off = getattr(layer, "disable_adapters", False) or getattr(layer, "merged_adapters", None)
    return not off and bool(getattr(layer, "active_adapters", None))


@dataclass
class Adapters:
    """The adapters of a model at one moment.

    Attributes:
        facts: the layers' classes and attributes, by path.
        tensors: parameters and buffers of the layers, without those of what they were put around.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Adapters:
        """Return those of a model."""
        found = cls()
        for path, layer in outermost(model):
            found._add(layer, path)
        return found

    def equal(self, other: Adapters) -> bool:
        """Return whether both have the same facts, and the very same tensors."""
        same = self.tensors.keys() == other.tensors.keys()
        return (
            same
            and self.facts == other.facts
            and all(other.tensors[name] is tensor for name, tensor in self.tensors.items())
        )

    def merged(self) -> dict[str, Any]:
        """Return which adapters are merged, by layer."""
        name = ".merged_adapters"
        return {k: v for k, v in self.facts.items() if k.endswith(name) and v}

    def _add(self, module: nn.Module, path: str) -> None:
        self.facts[path] = type(module)
        for name, value in attributes(module):
            self.facts[f"{path}.{name}"] = copy.deepcopy(value) if is_plain(value) else form(value)
        for table in TENSORS:
            for name, tensor in vars(module)[table].items():
                self.tensors[f"{path}.{name}"] = tensor
        for name, child in module._modules.items():
            if child is None or (name in BASES and not is_adapter(type(child))):
                self.facts[f"{path}.{name}"] = type(child)
            else:
                self._add(child, f"{path}.{name}")


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Give the attributes that a module has besides those of every module."""
    return ((n, value) for n, value in vars(module).items() if n not in _OF_EVERY_MODULE)


def is_plain(value: Any) -> bool:
    """Return whether a value is a number or text, or a container of such."""
    if isinstance(value, dict):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN)


def form(value: Any) -> Any:
    """Return what is compared of a value that is not plain."""
    return list(value) if isinstance(value, dict) else type(value)
