"""Trace two of many equal modules, and copy what was traced for the others.

A decoder calls a list of layers one after the other, and most of them are :mod:`match`. While
such a model is captured, two of each kind are traced; a mark stands in for each of the others::

    x_1 = entered(0, [x, cos, sin])                  h_1 = ...  # layer 0
    ...     # layer 0 as traced               =>     h_2 = ...  # layer 1
    x_2 = left(0, h_1)                               h_3 = ...  # layer 0 with layer 2's weights
    x_3 = entered(1, [x_2, cos, sin])                h_4 = ...  # and with layer 3's
    ...     # layer 1 as traced
    x_4 = left(1, h_2)
    x_5 = stood_in(2, [x_4, cos, sin])
    x_6 = stood_in(3, [x_5, cos, sin])

This file leaves the marks; :mod:`expand` replaces them.

Legal because what Dynamo traces follows from a module's code, its attributes, its arguments and
the description of its tensors. Twins agree in code, attributes and description; the marks record
the arguments, which are compared; and that values neither come in nor go out otherwise is checked.
What a module gets by way of Python (a counter, another module's state) shows in the second one: its
trace must be what the copy for it would have been. Where any of it does not hold,
:class:`NotRepeatedError` says why, and every module has to be traced.

``torch.compiler.nested_compile_region`` makes one subgraph of calls that are alike, writes to their
inputs included. It saves compiling, which equal pieces save here, and little of the tracing: 64
small layers took Dynamo 8.8 s with it and 11.4 s without (one run each, torch 2.13, two busy CPU
cores). Inside the subgraph, paths and sources are those of the first layer.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from .match import LayerIndex, Twins, twins

#: What a module gives: a tensor like its first argument, or a tuple that begins with one.
Result: TypeAlias = torch.Tensor | tuple[torch.Tensor | None, ...]
#: For each module that has a twin before it: the place of the first such, and how it corresponds.
First = Mapping[int, tuple[int, Twins]]


def seconds_of(first: First) -> dict[int, int]:
    """Return for the first module of each kind the one that is traced to check its trace."""
    found: dict[int, int] = {}
    for k, (r, _) in sorted(first.items()):
        found.setdefault(r, k)
    return found


class NotRepeatedError(Exception):
    """The trace of one module is not good for its twins."""


@dataclass(frozen=True)
class Repeat:
    """A list of modules that the captured function calls, each once.

    Attributes:
        source: the list, as Dynamo writes it over the function's arguments:
            ``L['model']._modules['layers']``.
        modules: its members.
        state: likewise by source, lists of what else belongs to each module:
            ``L['cache'].layers``.
        shared: objects that are handed to all modules.
    """

    source: str
    modules: Sequence[nn.Module]
    state: Mapping[str, Sequence[Any]]
    shared: tuple[Any, ...] = ()

    @classmethod
    def of(
        cls,
        argument: str,
        model: nn.Module,
        state: Mapping[str, Sequence[Any]],
        shared: tuple[Any, ...] = (),
    ) -> Repeat | None:
        """Return the first list of modules in `model` that is as long as those of `state`, if any.

        Args:
            argument: The captured function's name for `model`.
            model: Its lists are looked at in the order of ``named_modules``.
            state: See the class.
            shared: See the class.

        """
        lengths = {len(members) for members in state.values()}
        for path, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and {len(module)} == lengths:
                inner = "".join(f"._modules['{part}']" for part in path.split("."))
                return cls(f"L['{argument}']{inner}", tuple(module), state, shared)
        return None

    def first(self) -> First:
        """Return what need not be traced, but for the second of a kind; without kinds of two."""
        found: dict[int, tuple[int, Twins]] = {}
        kinds: list[int] = []
        for k in range(len(self.modules)):
            same = ((r, twins(self._belongings(r), self._belongings(k), r, k)) for r in kinds)
            match = next(
                ((r, correspondence) for r, correspondence in same if correspondence is not None),
                None,
            )
            if match is None:
                kinds.append(k)
            else:
                found[k] = match
        count = Counter(r for r, _ in found.values())
        return {k: (r, correspondence) for k, (r, correspondence) in found.items() if count[r] > 1}

    def _belongings(self, k: int) -> tuple[Any, ...]:
        return self.modules[k], *(members[k] for members in self.state.values())

    def known(self, k: int) -> tuple[Any, ...]:
        """Return the objects that module k may be called with, though no graph can hold them."""
        return *self.shared, *(members[k] for members in self.state.values())

    def prefixes(self, k: int) -> tuple[str, ...]:
        """Return how the sources of all that belongs to module k begin."""
        return f"{self.source}._modules['{k}']", *(f"{source}[{k}]" for source in self.state)


def entered(position: int, values: list[Any], names: tuple[str, ...]) -> torch.Tensor:
    """Mark that a module begins, with its arguments in order, and the names of named ones."""
    return torch.empty_like(values[0])


def left(position: int, result: Result, values: list[Any]) -> Result:
    """Mark that a module ends, with its result, and its arguments as they are now."""
    _results[position] = result
    return _like(result)


def stood_in(position: int, values: list[Any], names: tuple[str, ...], twin: int) -> Result:
    """Mark a whole module that is not traced, with its arguments as for `entered`."""
    return _like(_results.get(twin, values[0]))


def _like(result: Result) -> Result:
    if isinstance(result, tuple):
        return tuple(None if part is None else torch.empty_like(part) for part in result)
    return torch.empty_like(result)


MARKS = (entered, left, stood_in)
#: What traced modules give, as Dynamo describes it while it traces, by their places.
_results: dict[int, Result] = {}
for _mark in MARKS:
    torch.compiler.allow_in_graph(_mark)  # type: ignore[no-untyped-call]


@contextmanager
def marked(repeat: Repeat, first: First) -> Iterator[None]:
    """Leave marks in what is traced meanwhile, in place of the modules that need not be traced."""
    with ExitStack() as stack:
        stack.callback(_results.clear)
        seconds = seconds_of(first)
        for r in seconds:
            _set_class(stack, repeat, r)
        for k, (r, correspondence) in first.items():
            _set_class(stack, repeat, k, twin=None if seconds[r] == k else r)
            for owner, name in correspondence.places:
                own = vars(owner)
                stack.callback(own.__setitem__, name, own[name])
                own[name] = LayerIndex(r)
        yield


def _set_class(stack: ExitStack, repeat: Repeat, position: int, twin: int | None = None) -> None:
    """Give a module another forward: by its class, so that Dynamo knows it by the same name."""
    module = repeat.modules[position]
    base = type(module)
    stack.callback(setattr, module, "__class__", base)
    members = {"forward": _forward(repeat, position, twin), "__module__": base.__module__}
    try:
        module.__class__ = types.new_class(base.__name__, (base,), {}, lambda b: b.update(members))
    except TypeError as error:  # a class that takes arguments, or whose instances are laid out so
        raise NotRepeatedError(str(error)) from error


def _forward(repeat: Repeat, position: int, twin: int | None) -> Callable[..., Any]:
    """Return a forward that marks where the module begins and ends, or stands in for all of it.

    That is where it has a twin that is traced.
    """
    known = repeat.known(position)
    inner, kinds = type(repeat.modules[position]).forward, tuple({type(thing) for thing in known})
    # by identity: Dynamo would take a reference from here for the name of what it leads to
    names = {id(thing): f"object {number}" for number, thing in enumerate(known)}

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():  # somebody runs the model meanwhile
            return inner(module, *args, **kwargs)
        values = []
        for value in (*args, *kwargs.values()):
            values.append(names[id(value)] if isinstance(value, kinds) else value)
        if twin is not None:
            return stood_in(position, values, tuple(kwargs), twin=twin)
        stream = entered(position, values, tuple(kwargs))
        return left(position, inner(module, stream, *args[1:], **kwargs), values)

    return forward
