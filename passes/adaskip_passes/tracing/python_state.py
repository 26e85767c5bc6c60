"""What Python holds of a module tree at one moment, so that a later look tells what has changed.

What a trace gives depends on much that is no tensor: hooks, attributes, containers, classes, what
closures hold. Dynamo guards it, but a guard is about a source that was traced, and of layers that
are alike two are traced (:mod:`repeated_layers`). Here the whole tree is walked once
(:mod:`module_walk`), everything found is kept beside a shallow copy, and a look compares the two in
C: half a millisecond for 32 layers.

Tensors are looked at apart (`PythonState.tensors`): other values, or another tensor of the same
layout, are no other graph.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from .module_walk import HOOKS, Hooks, Walk, contents, facts, join, members_path


@dataclass(frozen=True)
class Change:
    """One difference from what was kept.

    Attributes:
        path: where, as Python text from the root: ``model.layers.1.mlp.act_fn``.
        names: the attribute that differs; of a container its key and the names that lead to it
            from its module; empty where its users are not known (a closure, a class).
        holder: the path of the object or container that it is in; "" where there is none.
        idle: whether it is of hooks that do nothing.
    """

    path: str
    names: tuple[str, ...] = ()
    holder: str = ""
    idle: bool = False

    def concerns(self, read: Collection[str]) -> bool:
        """Return whether code that reads these attributes and keys, and no others, may see it."""
        return not self.idle and (not self.names or any(name in read for name in self.names))

    def __str__(self) -> str:
        return self.path


class PythonState:
    """The Python state of a module tree, as it was when this was made."""

    def __init__(
        self,
        root: nn.Module,
        leave_out: Collection[str] = (),
        known: Collection[type] = (),
        apart: Collection[object] = (),
        idle: Callable[[object], bool] = lambda hook: False,
    ) -> None:
        """Walk the tree of `root`.

        Args:
            root: a module.
            leave_out: attributes of it that are not followed.
            known: classes whose functions are taken for what they are.
            apart: objects in it that are not followed either.
            idle: tells the hooks that do nothing, which may come and go.
        """
        self._idle = idle
        walk = Walk(root, leave_out, apart)
        self._live, self._kept, self._paths = walk.live, walk.kept, walk.paths
        self._empty, self._empty_paths = walk.empty, walk.empty_paths
        self._modules, self._module_paths = walk.modules, walk.module_paths
        self._kinds = list(map(type, walk.modules))
        self._methods = list(_methods(dict.fromkeys(self._kinds), known))
        self._attributes = walk.attributes
        self._cells, self._functions = walk.cells, walk.functions
        self._tensor_dicts, self._tensor_paths = walk.tensor_dicts, walk.tensor_paths
        self._names_by_dict = [*map(tuple, walk.tensor_dicts)]
        self._tensor_names = [*chain.from_iterable(walk.tensor_dicts)]

    def holds(self) -> bool:
        """Return whether nothing but tensors has changed."""
        try:
            return (
                self._live == self._kept
                and not any(self._empty)
                and [*map(type, self._modules)] == self._kinds
                and [*chain.from_iterable(self._tensor_dicts)] == self._tensor_names
                and all(vars(c).get(name) is f for c, name, f in self._methods)
                and all(_same(contents(cell), value) for cell, value, _ in self._cells)
                and all(facts(f) == known for f, known, _ in self._functions)
            )
        except Exception:  # what cannot be compared is not what it was
            return False

    def tensors(self) -> list[torch.Tensor | None]:
        """Return the parameters and buffers of all modules as they are now, in a fixed order."""
        return [*chain.from_iterable(map(dict.values, self._tensor_dicts))]

    def tensor_slots(self) -> Iterator[tuple[str, str]]:
        """Return where each of `tensors` is: the path of its module, and its name there."""
        for holder, path in zip(self._tensor_dicts, self._tensor_paths, strict=True):
            for name in holder:
                yield path, name

    def container(self, path: str) -> Any:
        """Return the object's dictionary or the container that was found at a path, if any."""
        module, _, name = path.rpartition(".")
        if name in HOOKS and module in self._module_paths:
            return Hooks(self._modules[self._module_paths.index(module)], name)
        for paths, found in ((self._paths, self._live), (self._empty_paths, self._empty)):
            if path in paths:
                return found[paths.index(path)]
        return None

    def changes(self) -> list[Change]:
        """Return what differs now, in the order of the walk; empty where `holds`."""
        found: list[Change] = []
        kept = (*zip(self._live, self._kept, self._paths, strict=True),)
        empty = (
            (c, type(c)(), path) for c, path in zip(self._empty, self._empty_paths, strict=True)
        )
        for live, before, path in (*kept, *empty):
            for key in _differing(live, before):
                changed = join(members_path(path), str(key))
                names, idle = self._names(changed, path, live), self._idles(path, live, before, key)
                found.append(Change(changed, names, path, idle))
        for module, kind, path in zip(self._modules, self._kinds, self._module_paths, strict=True):
            if type(module) is not kind:
                found.append(Change(join(path, "__class__")))
        tensors = zip(self._tensor_dicts, self._names_by_dict, self._tensor_paths, strict=True)
        for holder, known_names, path in tensors:
            found += [Change(join(path, name)) for name in sorted(set(known_names) ^ set(holder))]
        for owner, name, function in self._methods:
            if vars(owner).get(name) is not function:
                found.append(Change(f"{owner.__qualname__}.{name}"))
        for cell, value, path in self._cells:
            if not _same(contents(cell), value):
                found.append(Change(f"{path}, a variable of its closure"))
        for function, known, path in self._functions:
            if facts(function) != known:
                found.append(Change(f"{path}, the code of {function.__qualname__}"))
        return found

    def _idles(self, path: str, live: Any, before: Any, key: Any) -> bool:
        """Return whether what differs is of hooks that do nothing."""
        if path.rpartition(".")[2] not in HOOKS:
            return False
        if isinstance(live, Hooks):
            now, then = ([e for e in hooks if not self._idle(e[0])] for hooks in (live, before))
            return now == then
        return self._idle(live.get(key))

    def _names(self, path: str, holder: str, live: Any) -> tuple[str, ...]:
        """Return the names by which code gets to what differs, from its module on; see `Change`."""
        if id(live) in self._attributes:
            return (path[len(holder) :].lstrip("."),)
        module = max((p for p in self._module_paths if holder.startswith(p)), key=len)
        return (*holder[len(module) :].lstrip(".").split("."), path.rpartition(".")[2])


def _methods(kinds: Iterable[type], known: Collection[type]) -> Iterator[tuple[type, str, Any]]:
    """Return the functions of modules' own classes, which may be exchanged; not those of torch."""
    seen: set[type] = {object, *known}
    for kind in kinds:
        for owner in kind.__mro__:
            if owner in seen or owner.__module__.startswith("torch."):
                continue
            seen.add(owner)
            for name, value in list(vars(owner).items()):
                if isinstance(value, types.FunctionType):
                    yield owner, name, value


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    plain = isinstance(one, str | int | float | complex | bytes) and type(one) is type(other)
    return plain and bool(one == other)


def _differing(live: Any, kept: Any) -> list[Any]:
    """Return the keys whose values differ; [""] where it is the order, or no mapping."""
    if _equal(live, kept):
        return []
    if not isinstance(live, dict):
        return [""]
    keys = {**kept, **live}
    return [k for k in keys if k not in kept or k not in live or not _equal(live[k], kept[k])] or [
        ""
    ]


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:
        return False
