"""Adapters of peft's: what is done to the original's, a compiled model follows.

An adapter is part of the weights for who uses it: it is switched, scaled, merged and loaded on
whichever model is at hand. So the compiled model's adapters become as the original's are, unless
something was done to them alone.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adaskip_passes import UnsupportedError

from .state import ChangedError

#: What peft's layers call the module that they were put around.
_BASES = ("base_layer", "original_module", "model")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_TENSORS = ("_parameters", "_buffers")
#: Attributes of a model that say which adapters there are.
_OF_MODELS = ("peft_config", "_hf_peft_config_loaded")
_PLAIN = (bool, int, float, str, bytes, type(None))
_ABSENT = object()


@dataclass
class _Adapters:
    """The adapters of a model at one moment.

    Attributes:
        facts: the layers' classes and attributes, by path.
        tensors: parameters and buffers of the layers, without those of what they were put around.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> _Adapters:
        """Return those of a model."""
        found = cls()
        for path, layer in _outermost(model):
            found._add(layer, path)
        return found

    def equal(self, other: _Adapters) -> bool:
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
        for name, value in _attributes(module):
            self.facts[f"{path}.{name}"] = copy.deepcopy(value) if _is_plain(value) else _keys(value)
        for table in _TENSORS:
            for name, tensor in vars(module)[table].items():
                self.tensors[f"{path}.{name}"] = tensor
        for name, child in module._modules.items():
            if child is None or (name in _BASES and not is_adapter(type(child))):
                self.facts[f"{path}.{name}"] = type(child)
            else:
                self._add(child, f"{path}.{name}")


class FollowedAdapters:
    """Makes the adapters of a compiled model what those of the original are.

    Attributes:
        gone: paths where the original had layers of peft's, which were taken off when it was last
            followed.
    """

    def __init__(self, original: nn.Module, compiled: nn.Module) -> None:
        """Take what is there now for the same in both.

        Args:
            original: the user's model.
            compiled: the compiled model, which shares its tensors.
        """
        self._original, self._compiled = original, compiled
        self._agreed = _Adapters.of(original) if _is_imported() else _Adapters()
        self.gone: tuple[str, ...] = ()

    def follow(self) -> bool:
        """Do to the compiled model's adapters what was done to the original's since the last time.

        Where the compiled model's own were changed, nothing is done.

        Returns:
            Whether something was done.

        Raises:
            ChangedError: adapters are merged in the compiled model, and not in the original.
            UnsupportedError: adapters are merged and disabled.
        """
        if not _is_imported():
            return False
        theirs, ours = _Adapters.of(self._original), _Adapters.of(self._compiled)
        followed = False
        if not theirs.equal(self._agreed):
            if not theirs.equal(ours) and ours.facts == self._agreed.facts:
                self._copy()
                before = (p for p, kind in self._agreed.facts.items() if isinstance(kind, type))
                self.gone = tuple(p for p in before if p not in theirs.facts)
                ours, followed = _Adapters.of(self._compiled), True
            if ours.facts == theirs.facts:
                self._agreed = theirs
        if ours.merged() != theirs.merged() and not theirs.merged():
            path = next(iter(ours.merged()))
            raise ChangedError(
                f"{path}: adapters are merged into weights that the compiled model shares with the "
                "original, whose adapters are not; unmerge them and merge those of the original, "
                "which the compiled model follows"
            )
        refuse_unmerging(self._compiled)
        return followed

    def _copy(self) -> None:
        for name in _OF_MODELS:
            if name in vars(self._original):
                vars(self._compiled)[name] = copy.copy(vars(self._original)[name])
        paths = [path for model in (self._original, self._compiled) for path, _ in _outermost(model)]
        memo: dict[int, Any] = {}
        for path in dict.fromkeys(paths):
            theirs, ours = _at(self._original, path), _at(self._compiled, path)
            if theirs is None or ours is None:
                continue
            if type(theirs) is type(ours):
                self._copy_into(ours, theirs, path, memo)
            else:
                parent, _, name = path.rpartition(".")
                memo[id(_base(theirs))] = _base(ours)
                self._compiled.get_submodule(parent)._modules[name] = _copied(theirs, memo)

    def _copy_into(
        self, ours: nn.Module, theirs: nn.Module, path: str, memo: dict[int, Any]
    ) -> None:
        """Make a module what one of the same class is, but for the module that it is around."""
        attributes, known = vars(ours), dict(_attributes(theirs))
        for name in [n for n, _ in _attributes(ours) if n not in known]:
            del attributes[name]
        for name, value in known.items():
            if _is_plain(value):
                if attributes.get(name, _ABSENT) != value:
                    attributes[name] = copy.deepcopy(value)
            elif _keys(attributes.get(name, _ABSENT)) != _keys(value):
                attributes[name] = copy.copy(value)
        for table in _TENSORS:
            held, wanted = attributes[table], vars(theirs)[table]
            for name in [n for n in held if n not in wanted]:
                del held[name]
            for name, tensor in wanted.items():
                before = self._agreed.tensors.get(f"{path}.{name}", _ABSENT)
                if held.get(name, before) is before:
                    held[name] = tensor
        modules, children = ours._modules, theirs._modules
        for name in [n for n in modules if n not in children]:
            del modules[name]
        for name, child in children.items():
            if child is None or type(child) is not type(modules.get(name)):
                modules[name] = _copied(child, memo)
            elif name not in _BASES or is_adapter(type(child)):
                held_child = modules[name]
                assert held_child is not None
                self._copy_into(held_child, child, f"{path}.{name}", memo)


@functools.cache
def is_adapter(kind: type) -> bool:
    """Return whether modules of a class are layers of peft's."""
    return any(base.__module__.partition(".")[0] == "peft" for base in kind.__mro__)


def refuse_unmerging(model: nn.Module) -> None:
    """Refuse adapters that are merged and disabled: the next forward would unmerge them.

    Raises:
        UnsupportedError: some are.
    """
    if not _is_imported():
        return
    for path, layer in _outermost(model):
        if getattr(layer, "merged_adapters", None) and getattr(layer, "disable_adapters", False):
            raise UnsupportedError(
                f"{path}: its adapters are merged and disabled, so that its next forward would "
                "write to its weights; unmerge_adapter() first"
            )


def _is_imported() -> bool:
    return "peft" in sys.modules


def _outermost(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Give the layers of peft's in a tree with their paths, but none that is within another."""
    for name, child in module._modules.items():
        if child is None:
            continue
        there = f"{path}.{name}" if path else name
        if is_adapter(type(child)):
            yield there, child
        else:
            yield from _outermost(child, there)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Give the attributes that a module has besides those of every module."""
    return ((n, value) for n, value in vars(module).items() if n not in _OF_EVERY_MODULE)


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number or text, or a container of such."""
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _keys(value: Any) -> Any:
    """Return what is compared of a value that is not plain."""
    return list(value) if isinstance(value, dict) else type(value)


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _base(module: nn.Module) -> nn.Module:
    """Return the module that layers of peft's were put around; any other is its own."""
    while is_adapter(type(module)):
        bases = (module._modules.get(name) for name in _BASES)
        inner = next((b for b in bases if b is not None), None)
        if inner is None:
            break
        module = inner
    return module


def _copied(module: nn.Module | None, memo: dict[int, Any]) -> nn.Module | None:
    """Return a copy that has the same tensors; `memo` names what else is not copied."""
    if module is not None:
        memo.update({id(t): t for t in (*module.parameters(), *module.buffers())})
    return copy.deepcopy(module, memo)
