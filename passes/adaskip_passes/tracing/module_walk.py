"""Walk through a module tree and what hangs on it, and keep what is found beside a copy."""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from enum import Enum
from functools import partial
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
HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_backward_pre_hooks": (),
    "_backward_hooks": (),
}


class Hooks:
    """A module's hooks of one kind, in order: a hook that is registered again is the same hook."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        attributes = vars(self._module)
        marks = [attributes.get(flags, ()) for flags in HOOKS[self._name]]
        for number, hook in attributes[self._name].items():
            yield hook, *(number in mark for mark in marks)

    def __eq__(self, other: object) -> bool:
        return [*self] == other

    __hash__ = None  # type: ignore[assignment]


class Walk:
    """A walk through a module tree and what hangs on it, near things first.

    Attributes:
        live: The dictionaries and containers that were found, as they are.
        kept: Shallow copies of them, in the same order.
        paths: Where each was found.
        empty: The empty containers that were found.
        empty_paths: Where each was found.
        modules: The modules.
        module_paths: Where each was found.
        attributes: The identities of those of `live` that are objects' dictionaries.
        cells: The cells of closures, their contents and where they were found.
        functions: The functions, what they do (`facts`) and where they were found.
        tensor_dicts: The dictionaries of parameters and buffers that are not empty.
        tensor_paths: The module of each.

    """

    def __init__(
        self, root: nn.Module, leave_out: Collection[str], apart: Collection[object] = ()
    ) -> None:
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
        self._left_out = {id(vars(root).get(name)) for name in leave_out} | set(map(id, apart))
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
        attributes = vars(module)
        for name in _TENSORS:
            holder = attributes.get(name)
            if holder:
                self.tensor_dicts.append(holder)
                self.tensor_paths.append(path)
            elif holder is not None:
                self._nothing_in(holder, path)
            self._seen[id(holder)] = holder
        for name, flags in HOOKS.items():
            self._hooks(module, name, flags, path)
        self._attributes(attributes, path)

    def _hooks(self, module: nn.Module, name: str, flags: Iterable[str], path: str) -> None:
        attributes = vars(module)
        hooks = attributes.get(name)
        if not hooks:
            return  # looked at as any container
        for known in (hooks, *(attributes[flag] for flag in flags if attributes.get(flag))):
            self._seen[id(known)] = known
        path = join(path, name)
        self._keep(Hooks(module, name), path)
        for number, hook in hooks.items():
            self._later(hook, join(path, str(number)))

    def _attributes(self, attributes: dict[str, Any], path: str) -> None:
        self._keep(attributes, path)
        self.attributes.add(id(attributes))
        for name, value in attributes.items():
            self._later(value, join(path, name))

    def _container(self, value: Any, path: str) -> None:
        if not value:
            self._nothing_in(value, path)
            return
        self._keep(value, path)
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            self._later(item, join(members_path(path), str(key)))

    def _function(self, function: types.FunctionType, path: str) -> None:
        self.functions.append((function, facts(function), path))
        for cell in function.__closure__ or ():
            if id(cell) in self._seen:
                continue
            self._seen[id(cell)] = cell
            self.cells.append((cell, contents(cell), path))
            self._later(contents(cell), path)
        for part in (function.__defaults__, function.__kwdefaults__, vars(function)):
            self._later(part, path)

    def _keep(self, live: Any, path: str) -> None:
        self.live.append(live)
        self.kept.append(_copy(live))
        self.paths.append(path)

    def _nothing_in(self, container: Any, path: str) -> None:
        self.empty.append(container)
        self.empty_paths.append(path)


def facts(function: types.FunctionType) -> tuple[Any, ...]:
    """Return what a function does, by its code and defaults."""
    return function.__code__, function.__defaults__, function.__kwdefaults__


def contents(cell: types.CellType) -> Any:
    """Return what a cell of a closure holds; the type of cells where it is empty."""
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return types.CellType


def _copy(live: Any) -> Any:
    """Return a shallow copy for comparison; of a mapping of another class a plain dictionary."""
    if isinstance(live, OrderedDict):
        return OrderedDict(live)
    if isinstance(live, dict | defaultdict):
        return dict(live)
    return type(live)(live) if type(live) in (list, set, deque) else list(live)


def members_path(path: str) -> str:
    """Return what the paths of a container's members begin with; modules are called as users do."""
    return path.removesuffix("_modules").removesuffix(".")


def join(path: str, name: str) -> str:
    """Return the path of what is found under a name at a path."""
    return f"{path}.{name}" if path and name else path or name
