"""When two modules are the same code over other tensors.

What Dynamo traces depends on a module's classes, attributes and containers, and on its tensors by
shape, stride, dtype and device alone. Two modules that agree in all of that, each part of the one
with its part of the other, trace alike; their tensors correspond one to one. The one thing that
may differ is a module's own place in its list, which many attention modules keep as
``layer_idx``: see :class:`LayerIndex`.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, so all its state is in sight
_PLAIN = frozenset(
    [
        *(str, int, float, complex, bool, bytes, type(None), range, slice, set, frozenset),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    ]
)
_TENSORS = frozenset((torch.Tensor, nn.Parameter, nn.Buffer))


def _refuse(*_operands: Any) -> NoReturn:
    raise TypeError("what depends on a module's place in its list is not the same for its twins")


class LayerIndex:
    """A module's place in its list, as something that is passed on and not looked at.

    While a module is traced on behalf of its twins, the integers in it that are nothing but its
    place are replaced by this. Who knows what to do with it asks for its `value`; arithmetic,
    comparison, use as an index or a key, and printing raise, so that code which depends on the
    place is found out. (Only questions about its type and its identity are answered.)
    """

    def __init__(self, value: int) -> None:
        self.value = value

    __hash__ = __repr__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __bool__ = __int__ = __index__ = __float__ = __str__ = __format__ = _refuse
    __add__ = __sub__ = __mul__ = __floordiv__ = __truediv__ = __mod__ = __pow__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rfloordiv__ = __rtruediv__ = __rmod__ = __rpow__ = _refuse
    __and__ = __or__ = __xor__ = __rand__ = __ror__ = __rxor__ = __neg__ = __abs__ = _refuse


def layer_index(index: int | LayerIndex) -> int:
    """Return the integer, whether it is hidden or not."""
    return index.value if isinstance(index, LayerIndex) else index


@dataclass(frozen=True, eq=False)
class Twins:
    """How an object corresponds to another that traces alike.

    Attributes:
        tensors: by identity of each tensor of the first: itself, and the tensor of the second.
        places: the attributes of the first that hold nothing but its place: owner and name.
    """

    tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    places: list[tuple[Any, str]] = field(default_factory=list)


class _DifferError(Exception):
    """The two are no twins."""


def twins(one: Any, other: Any, position: int, other_position: int) -> Twins | None:
    """Return how one object corresponds to another, or None if they may trace differently.

    Args:
        one: A module, or an object with tensors (a tuple compares several at once).
        other: What it is compared with.
        position: Where the first is in its list.
        other_position: Where the second is.

    """
    walk = _Walk(position, other_position)
    try:
        walk.compare(one, other)
    except Exception:  # they differ, or hold something that cannot be compared
        return None
    return walk.found


class _Walk:
    """A comparison, part by part. What one of the two holds twice, the other must as well."""

    def __init__(self, position: int, other_position: int) -> None:
        self.places = (position, other_position)
        self.found = Twins()
        self._pairs: dict[int, tuple[Any, Any]] = {}  # by identity of the first
        self._back: dict[int, Any] = {}  # by identity of the second

    def compare(self, one: Any, other: Any) -> None:
        """Compare two parts.

        Raises:
            Exception: They differ, or hold something that cannot be compared.
        """
        kind = type(one)
        _require(kind is type(other))
        if kind in _PLAIN or isinstance(one, enum.Enum):
            _require(one == other)
        elif kind is tuple:
            self._items(one, other)
        elif not self._met(one, other):
            self._parts(kind, one, other)

    def _met(self, one: Any, other: Any) -> bool:
        """Return whether the pair has been compared; neither may be paired with something else."""
        pair = self._pairs.get(id(one))
        _require(self._back.get(id(other), one) is one and (pair is None or pair[1] is other))
        self._pairs[id(one)], self._back[id(other)] = (one, other), one
        return pair is not None

    def _parts(self, kind: type, one: Any, other: Any) -> None:
        if kind in _TENSORS:
            self._tensor(one, other)
        elif kind is list:
            self._items(one, other)
        elif kind is dict or kind is OrderedDict:
            self._entries(one, other)
        elif one is other and not isinstance(one, nn.Module):
            return  # a function, a class, a configuration
        elif kind is types.MethodType:
            _require(one.__func__ is other.__func__)
            self.compare(one.__self__, other.__self__)
        elif kind is types.FunctionType:
            self._function(one, other)
        elif kind is functools.partial:
            self.compare(
                (one.func, one.args, one.keywords), (other.func, other.args, other.keywords)
            )
        else:
            self._object(kind, one, other)

    def _function(self, one: types.FunctionType, other: types.FunctionType) -> None:
        """Compare functions that were made for their modules, which their closures hold."""
        _require(one.__code__ is other.__code__ and one.__globals__ is other.__globals__)
        for function in (one, other):
            _require(not vars(function))
        for mine, theirs in ((one.__defaults__, other.__defaults__), (_held(one), _held(other))):
            self.compare(mine, theirs)
        self.compare(one.__kwdefaults__, other.__kwdefaults__)

    def _items(self, one: Any, other: Any) -> None:
        _require(len(one) == len(other))
        for mine, theirs in zip(one, other, strict=True):
            self.compare(mine, theirs)

    def _entries(self, one: Any, other: Any) -> None:
        _require(list(one) == list(other))
        for key, value in one.items():
            self.compare(value, other[key])

    def _tensor(self, one: torch.Tensor, other: torch.Tensor) -> None:
        _require(_layout(one) == _layout(other))
        self.found.tensors[id(one)] = (one, other)
        self.compare(vars(one), vars(other))

    def _object(self, kind: type, one: Any, other: Any) -> None:
        """Compare attribute by attribute; only of classes that keep nothing elsewhere."""
        in_sight = (
            c is object or (c.__flags__ & _HEAP_TYPE and not vars(c).get("__slots__"))
            for c in kind.__mro__
        )
        _require(all(in_sight))
        mine, theirs = vars(one), vars(other)
        _require(list(mine) == list(theirs))
        for name, value in mine.items():
            if type(value) is int and (value, theirs[name]) == self.places:
                self.found.places.append((one, name))
            else:
                self.compare(value, theirs[name])


def _held(function: types.FunctionType) -> tuple[Any, ...]:
    """Return what a function's closure holds."""
    return tuple(cell.cell_contents for cell in function.__closure__ or ())


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        *(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.layout),
        *(tensor.requires_grad, tensor.is_inference(), tensor.is_leaf),
    )


def _require(condition: bool) -> None:
    if not condition:
        raise _DifferError
