"""What Python holds of a module tree at one moment, so that a later look tells what has changed.

What a trace gives depends on much that is no tensor: hooks, attributes, containers, classes, what
closures hold. Dynamo guards it, but a guard is about a source that was traced, and of layers that
are alike two are traced (:mod:`repeated_layers`). Here the whole tree is walked once, everything
found is kept beside a shallow copy, and a look compares the two in C: half a millisecond for 32
layers.

Tensors are looked at apart (`PythonState.tensors`): other values, or another tensor of the same
layout, are no other graph.
"""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, list, set, deque)  # that can be changed in place
_NOT_FOLLOWED = (
    *(str, bytes, int, float, complex, type(None), range, slice, Enum, type),
    *(torch.Tensor, torch.dtype, torch.device, types.ModuleType, types.BuiltinFunctionType),
    *(types.GeneratorType, types.CodeType, types.FrameType, torch.Generator),
)
#: Objects that are followed besides modules; a hook may lead to a whole training run.
_MOST_OBJECTS = 20_000
_TENSORS = ("_parameters", "_buffers")
#: A module's hooks by the number of their handle, and the numbers for which more is true.
_HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_backward_pre_hooks": (),
    "_backward_hooks": (),
}


@dataclass(frozen=True)
class Change:
    """One difference from what was kept.

    Attributes:
        path: where, as Python text from the root: ``model.layers.1.mlp.act_fn``.
        names: the attribute that differs; of a container its key and the names that lead to it
            from its module; empty where whoever uses it is not known (a closure, a class).
        holder: the path of the object or container that it is in; "" where there is none.
    """

    path: str
    names: tuple[str, ...] = ()
    holder: str = ""

    def concerns(self, read: Collection[str]) -> bool:
        """Whether code that reads these attributes and keys, and no others, may see it."""
        return not self.names or any(name in read for name in self.names)

    def __str__(self) -> str:
        return self.path


class PythonState:
    """The Python state of a module tree, as it was when this was made."""

    def __init__(
        self, root: nn.Module, leave_out: Collection[str] = (), known: Collection[type] = ()
    ) -> None:
        """Walk the tree of `root`.

        Args:
            root: a module.
            leave_out: attributes of it that are not followed.
            known: classes whose functions are taken for what they are.
        """
        walk = _Walk(root, leave_out)
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
        """Whether nothing but tensors has changed."""
        try:
            return (
                self._live == self._kept
                and not any(self._empty)
                and [*map(type, self._modules)] == self._kinds
                and [*chain.from_iterable(self._tensor_dicts)] == self._tensor_names
                and all(vars(c).get(name) is f for c, name, f in self._methods)
                and all(_same(_inside(cell), value) for cell, value, _ in self._cells)
                and all(_facts(f) == known for f, known, _ in self._functions)
            )
        except Exception:  # what cannot be compared is not what it was
            return False

    def tensors(self) -> list[torch.Tensor | None]:
        """The parameters and buffers of all modules as they are now, in a fixed order."""
        return [*chain.from_iterable(map(dict.values, self._tensor_dicts))]

    def tensor_slots(self) -> Iterator[tuple[str, str]]:
        """Where each of `tensors` is: the path of its module, and its name there."""
        for holder, path in zip(self._tensor_dicts, self._tensor_paths, strict=True):
            for name in holder:
                yield path, name

    def container(self, path: str) -> Any:
        """The object's dictionary, or the container, that was found at a path; None if none was."""
        module, _, name = path.rpartition(".")
        if name in _HOOKS and module in self._module_paths:
            return _Hooks(self._modules[self._module_paths.index(module)], name)
        for paths, found in ((self._paths, self._live), (self._empty_paths, self._empty)):
            if path in paths:
                return found[paths.index(path)]
        return None

    def changes(self) -> list[Change]:
        """What differs now, in the order of the walk; empty where `holds`."""
        found: list[Change] = []
        kept = (*zip(self._live, self._kept, self._paths, strict=True),)
        empty = (
            (c, type(c)(), path) for c, path in zip(self._empty, self._empty_paths, strict=True)
        )
        for live, before, path in (*kept, *empty):
            for key in _differing(live, before):
                changed = _join(_children(path), str(key))
                found.append(Change(changed, self._names(changed, path, live), path))
        for module, kind, path in zip(self._modules, self._kinds, self._module_paths, strict=True):
            if type(module) is not kind:
                found.append(Change(_join(path, "__class__")))
        tensors = zip(self._tensor_dicts, self._names_by_dict, self._tensor_paths, strict=True)
        for own, known_names, path in tensors:
            found += [Change(_join(path, name)) for name in sorted(set(known_names) ^ set(own))]
        for owner, name, function in self._methods:
            if vars(owner).get(name) is not function:
                found.append(Change(f"{owner.__qualname__}.{name}"))
        for cell, value, path in self._cells:
            if not _same(_inside(cell), value):
                found.append(Change(f"{path}, a variable of its closure"))
        for function, known, path in self._functions:
            if _facts(function) != known:
                found.append(Change(f"{path}, the code of {function.__qualname__}"))
        return found

    def _names(self, path: str, holder: str, live: Any) -> tuple[str, ...]:
        """By what names code gets to what differs, from its module on; see `Change`."""
        if id(live) in self._attributes:
            return (path[len(holder) :].lstrip("."),)
        module = max((p for p in self._module_paths if holder.startswith(p)), key=len)
        return (*holder[len(module) :].lstrip(".").split("."), path.rpartition(".")[2])


class _Hooks:
    """A module's hooks of one kind, in order: a hook that is registered again is the same hook."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        own = vars(self._module)
        marks = [own.get(flags, ()) for flags in _HOOKS[self._name]]
        for number, hook in own[self._name].items():
            yield hook, *(number in mark for mark in marks)

    def __eq__(self, other: object) -> bool:
        return [*self] == other

    __hash__ = None  # type: ignore[assignment]


class _Walk:
    """One walk through a module tree and what hangs on it, near things first."""

    def __init__(self, root: nn.Module, leave_out: Collection[str]) -> None:
        self.live: list[Any] = []
        self.kept: list[Any] = []
        self.paths: list[str] = []
        self.empty: list[Any] = []
        self.empty_paths: list[str] = []
        self.modules: list[nn.Module] = []
        self.module_paths: list[str] = []
        self.attributes: set[int] = set()  # of what is kept: which are objects' dictionaries
        self.cells: list[tuple[types.CellType, Any, str]] = []
        self.functions: list[tuple[types.FunctionType, tuple[Any, ...], str]] = []
        self.tensor_dicts: list[dict[str, Any]] = []
        self.tensor_paths: list[str] = []
        self._seen: dict[int, Any] = {}  # by identity, and alive, so that it stays theirs
        self._queue: deque[tuple[Any, str]] = deque([(root, "")])
        self._objects = 0
        self._left_out = {id(vars(root).get(name)) for name in leave_out}
        while self._queue:
            self._visit(*self._queue.popleft())

    def _later(self, value: Any, path: str) -> None:
        if not isinstance(value, _NOT_FOLLOWED) and id(value) not in self._seen:
            self._seen[id(value)] = value
            self._queue.append((value, path))

    def _visit(self, value: Any, path: str) -> None:
        if id(value) in self._left_out:
            return
        if isinstance(value, nn.Module):
            self._module(value, path)
        elif isinstance(value, _CONTAINERS):
            self._container(value, path)
        elif isinstance(value, tuple | frozenset):
            for item in value:
                self._later(item, path)
        elif isinstance(value, types.FunctionType):
            self._function(value, path)
        elif isinstance(value, types.MethodType):
            self._later(value.__self__, path)
            self._later(value.__func__, path)
        elif isinstance(value, partial):
            for part in (value.func, value.args, value.keywords):
                self._later(part, path)
        elif self._objects < _MOST_OBJECTS and isinstance(getattr(value, "__dict__", None), dict):
            self._objects += 1
            self._attributes(vars(value), path)

    def _module(self, module: nn.Module, path: str) -> None:
        self.modules.append(module)
        self.module_paths.append(path)
        own = vars(module)
        for name in _TENSORS:
            holder = own.get(name)
            if holder:
                self.tensor_dicts.append(holder)
                self.tensor_paths.append(path)
            elif holder is not None:
                self._nothing_in(holder, path)
            self._seen[id(holder)] = holder
        for name, flags in _HOOKS.items():
            self._hooks(module, name, flags, path)
        self._attributes(own, path)

    def _hooks(self, module: nn.Module, name: str, flags: Iterable[str], path: str) -> None:
        own = vars(module)
        hooks = own.get(name)
        if not hooks:
            return  # looked at as any container
        for known in (hooks, *(own[flag] for flag in flags if own.get(flag))):
            self._seen[id(known)] = known
        path = _join(path, name)
        self._keep(_Hooks(module, name), path)
        for number, hook in hooks.items():
            self._later(hook, _join(path, str(number)))

    def _attributes(self, own: dict[str, Any], path: str) -> None:
        self._keep(own, path)
        self.attributes.add(id(own))
        for name, value in own.items():
            self._later(value, _join(path, name))

    def _container(self, value: Any, path: str) -> None:
        if not value:
            self._nothing_in(value, path)
            return
        self._keep(value, path)
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            self._later(item, _join(_children(path), str(key)))

    def _function(self, function: types.FunctionType, path: str) -> None:
        self.functions.append((function, _facts(function), path))
        for cell in function.__closure__ or ():
            if id(cell) in self._seen:
                continue
            self._seen[id(cell)] = cell
            self.cells.append((cell, _inside(cell), path))
            self._later(_inside(cell), path)
        for part in (function.__defaults__, function.__kwdefaults__, vars(function)):
            self._later(part, path)

    def _keep(self, live: Any, path: str) -> None:
        self.live.append(live)
        self.kept.append(_copy(live))
        self.paths.append(path)

    def _nothing_in(self, container: Any, path: str) -> None:
        self.empty.append(container)
        self.empty_paths.append(path)


def describe_tensor(tensor: Any) -> Any:
    """What a graph depends on of a tensor: everything but its values."""
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
    """Which of some tensors are the same object: for each the place of its first appearance."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(t), i) for i, t in enumerate(tensors))


def _methods(kinds: Iterable[type], known: Collection[type]) -> Iterator[tuple[type, str, Any]]:
    """The functions of modules' own classes, which may be exchanged; not those of torch."""
    seen: set[type] = {object, *known}
    for kind in kinds:
        for owner in kind.__mro__:
            if owner in seen or owner.__module__.startswith("torch."):
                continue
            seen.add(owner)
            for name, value in list(vars(owner).items()):
                if isinstance(value, types.FunctionType):
                    yield owner, name, value


def _facts(function: types.FunctionType) -> tuple[Any, ...]:
    return function.__code__, function.__defaults__, function.__kwdefaults__


def _inside(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return types.CellType


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    plain = isinstance(one, str | int | float | complex | bytes) and type(one) is type(other)
    return plain and bool(one == other)


def _copy(live: Any) -> Any:
    """A shallow copy for comparison; of a mapping of another class a plain dictionary."""
    if isinstance(live, OrderedDict):
        return OrderedDict(live)
    if isinstance(live, dict | defaultdict):
        return dict(live)
    return type(live)(live) if type(live) in (list, set, deque) else list(live)


def _differing(live: Any, kept: Any) -> list[Any]:
    """The keys whose values differ; [""] where it is the order, or no mapping."""
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


def _children(path: str) -> str:
    """What the paths of a container's members begin with; modules are called as users do."""
    return path.removesuffix("_modules").removesuffix(".")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
