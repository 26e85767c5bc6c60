"""Adapters of peft's: what is done to the original's, a compiled model follows.

An adapter is part of the weights for who uses it: it is switched, scaled, merged and loaded on
whichever model is at hand. So the compiled model's adapters become as the original's are, unless
something was done to them alone.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn

from adaskip_passes import UnsupportedError

from ..utils.peft_layers import (
    BASES,
    TENSORS,
    Adapters,
    attributes,
    base_of,
    form,
    is_adapter,
    is_plain,
    outermost,
)
from ..utils.transformers_internals import ADAPTERS
from .state import ChangedError

_ABSENT = object()


class FollowedAdapters:
    """Makes the adapters of a compiled model what those of the original are.

    Attributes:
        gone: paths where the original had layers of peft's, which were taken off since the original
            was last found to be as it is.
        merges: the lists in which layers of the original keep what is merged into their weights.
    """

    def __init__(self, original: nn.Module, compiled: nn.Module) -> None:
        """Take what is there now for the same in both.

        Args:
            original: the user's model.
            compiled: the compiled model, which shares its tensors.
        """
        self._original, self._compiled = original, compiled
        self._agreed = Adapters.of(original)
        self.gone: tuple[str, ...] = ()
        self.merges = _merges(original)

    def follow(self) -> bool:
        """Do to the compiled model's adapters what was done to the original's since the last time.

        Where the compiled model's own were changed, nothing is done.

        Returns:
            Whether something was done.

        Raises:
            ChangedError: adapters are merged in the compiled model, and not so in the original.
            UnsupportedError: adapters are merged and disabled.
        """
        if "peft" not in sys.modules:
            return False
        theirs, ours = Adapters.of(self._original), Adapters.of(self._compiled)
        self.merges = _merges(self._original)
        followed = False
        if not theirs.equal(self._agreed):
            if not theirs.equal(ours) and ours.facts == self._agreed.facts:
                self._copy()
                before = (p for p, kind in self._agreed.facts.items() if isinstance(kind, type))
                self.gone += tuple(p for p in before if p not in theirs.facts)
                ours, followed = Adapters.of(self._compiled), True
            if ours.facts == theirs.facts:
                self._agreed = theirs
        alone = [p for p, names in ours.merged().items() if theirs.merged().get(p) != names]
        if alone:
            raise ChangedError(
                f"{alone[0]}: adapters are merged into weights that the compiled model shares with "
                "the original, whose adapters are not; undo it, and merge those of the original, "
                "which the compiled model follows"
            )
        refuse_unmerging(self._compiled)
        return followed

    def _copy(self) -> None:
        for name in ADAPTERS:
            if name in vars(self._original):
                vars(self._compiled)[name] = copy.copy(vars(self._original)[name])
        paths = [path for model in (self._original, self._compiled) for path, _ in outermost(model)]
        memo: dict[int, Any] = {}
        for path in dict.fromkeys(paths):
            theirs, ours = _at(self._original, path), _at(self._compiled, path)
            if theirs is None or ours is None:
                continue
            if type(theirs) is type(ours):
                self._copy_into(ours, theirs, path, memo)
            else:
                parent, _, name = path.rpartition(".")
                base, mine = base_of(theirs), base_of(ours)
                if _same_tensors(base, mine):  # else it is a trained copy (`modules_to_save`)
                    memo[id(base)] = mine
                self._compiled.get_submodule(parent)._modules[name] = _copied(theirs, memo)

    def _copy_into(
        self, ours: nn.Module, theirs: nn.Module, path: str, memo: dict[int, Any]
    ) -> None:
        """Make a module what one of the same class is, but for the module that it is around."""
        mine, known = vars(ours), dict(attributes(theirs))
        for name in [n for n, _ in attributes(ours) if n not in known]:
            del mine[name]
        for name, value in known.items():
            if is_plain(value):
                if mine.get(name, _ABSENT) != value:
                    mine[name] = copy.deepcopy(value)
            elif form(mine.get(name, _ABSENT)) != form(value):
                mine[name] = copy.copy(value)
        for table in TENSORS:
            held, wanted = mine[table], vars(theirs)[table]
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
            elif name not in BASES or is_adapter(type(child)):
                held_child = modules[name]
                assert held_child is not None
                self._copy_into(held_child, child, f"{path}.{name}", memo)


def refuse_unmerging(model: nn.Module) -> None:
    """Refuse adapters that are merged and disabled: the next forward would unmerge them.

    Raises:
        UnsupportedError: some are.
    """
    for path, layer in outermost(model):
        if getattr(layer, "merged_adapters", None) and getattr(layer, "disable_adapters", False):
            raise UnsupportedError(
                f"{path}: its adapters are merged and disabled, so that its next forward would "
                "write to its weights; unmerge_adapter() first"
            )


def _merges(model: nn.Module) -> list[list[str]]:
    layers = (layer for _, outer in outermost(model) for layer in outer.modules())
    held = (getattr(layer, "merged_adapters", None) for layer in layers)
    return [names for names in held if isinstance(names, list)]


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules hold the same parameters and buffers."""
    held = ([id(t) for t in (*m.parameters(), *m.buffers())] for m in (one, other))
    return next(held) == next(held)


def _copied(module: nn.Module | None, memo: dict[int, Any]) -> nn.Module | None:
    """Return a copy that has the same tensors; `memo` names what else is not copied."""
    if module is not None:
        memo.update({id(t): t for t in (*module.parameters(), *module.buffers())})
    return copy.deepcopy(module, memo)
