"""What was traced of one module, and its copies for the module's twins."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .mark import NotRepeatedError
from .match import Twins

if TYPE_CHECKING:
    from .expand import Expansion


@dataclass(frozen=True)
class Region:
    """What was traced of one module, between its marks.

    Attributes:
        entered: The mark where it begins.
        left: The mark where it ends.
        nodes: The nodes between them, in order.

    """

    entered: fx.Node
    left: fx.Node
    nodes: tuple[fx.Node, ...]

    @classmethod
    def between(cls, entered: fx.Node, left: fx.Node) -> Region:
        """Return the region between two marks of one module.

        Raises:
            NotRepeatedError: Something of it is read outside, or it changes the containers among
                its arguments, or its result is not like its first argument.
        """
        nodes, node = [], entered.next
        while node is not left:
            nodes.append(node)
            node = node.next
        inside = {*nodes, left}
        for node in (entered, *nodes):
            alone = inside.issuperset(node.users) or is_size(node)
            require(alone, f"{node.name} is read outside of the module that computes it")
        same = entered.args[1][1:] == left.args[2][1:]  # type: ignore[index]
        require(same, "a module changes the containers that it is called with")
        for value in (stream_of(entered), parts_of(left)[0]):
            alike = isinstance(value, fx.Node) and _description(value) == _description(entered)
            require(alike, "the module's result is not like its first argument")
        return cls(entered, left, tuple(nodes))


class Copy:
    """The copy of one traced module for one of its twins."""

    def __init__(
        self, expansion: Expansion, region: Region, mark: fx.Node, correspondence: Twins
    ) -> None:
        self.expansion = expansion
        self.region = region
        self.mark = mark
        self.correspondence = correspondence
        self.passed_for: dict[fx.Node, fx.Node] = {}
        _correspond(region.entered.args[1:], mark.args[1:], self.passed_for)
        self.copies = {region.entered: stream_of(mark)}

    def made(self) -> tuple[fx.Node | None, ...]:
        """Write the copy before the mark; returns the parts of its result."""
        graph, rename = self.expansion.graph, _renaming(self.region.entered, self.mark)
        with graph.inserting_before(self.mark):
            for node in self.region.nodes:
                copy = self.copies[node] = graph.node_copy(node, self._counterpart)
                if "nn_module_stack" in copy.meta:
                    copy.meta["nn_module_stack"] = rename(copy.meta["nn_module_stack"])
        result = parts_of(self.region.left)
        return tuple(None if part is None else self._counterpart(part) for part in result)

    def compare(self, traced: Region) -> None:
        """Require that the twin's own trace is what the copy would be.

        But for numbers: Dynamo computes a length once, and lets later modules read it. What the
        values are like follows from the operations and from the arguments, which are compared.

        Raises:
            NotRepeatedError: It is something else.

        """
        self.copies[self.region.entered] = traced.entered
        mine, theirs = ([n for n in r.nodes if not is_size(n)] for r in (self.region, traced))
        alike = len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=False):
            alike = alike and self._same(one, other)
            self.copies[one] = other
        results = self.region.left.args[1], traced.left.args[1]
        require(alike and self._same_operands(*results), "twins were traced differently")

    def _same(self, one: fx.Node, other: fx.Node) -> bool:
        return (
            (one.op, one.target) == (other.op, other.target)
            and self._same_operands(one.args, other.args)
            and self._same_operands(one.kwargs, other.kwargs)
        )

    def _same_operands(self, one: Any, other: Any) -> bool:
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            if is_size(one):
                return is_size(other) and _description(one) == _description(other)
            return self._counterpart(one) is other
        if isinstance(one, tuple | list):
            pairs = zip(one, other, strict=False)
            return len(one) == len(other) and all(self._same_operands(*pair) for pair in pairs)
        if isinstance(one, dict):
            values = list(one.values()), list(other.values())
            return list(one) == list(other) and self._same_operands(*values)
        if isinstance(one, slice):
            ends = ((s.start, s.stop, s.step) for s in (one, other))
            return isinstance(other, slice) and self._same_operands(*ends)
        return type(one) is type(other) and bool(one == other)

    def _counterpart(self, node: fx.Node) -> fx.Node:
        """Return what the twin reads where the traced module reads `node`."""
        if node not in self.copies:
            bound = node in self.expansion.real
            self.copies[node] = self._input(node) if bound else self._value(node)
        return self.copies[node]

    def _value(self, node: fx.Node) -> fx.Node:
        passed = node in self.passed_for or is_size(node) or node.op == "get_attr"
        require(passed, f"{node.name} reaches a module otherwise than as an argument")
        return self.passed_for.get(node, node)

    def _input(self, node: fx.Node) -> fx.Node:
        mine = self.expansion.real[node]
        paired = self.correspondence.tensors.get(id(mine))
        theirs = mine if paired is None else paired[1]
        if node in self.passed_for:
            same = theirs is mine or self.expansion.real.get(self.passed_for[node]) is theirs
            require(same, f"{node.name} is an argument, and another belongs to the module")
            return self.passed_for[node]
        source = self._source(self.expansion.sources[node])
        if theirs is mine:
            require(source is None or paired is not None, f"{node.name} has no counterpart")
            return node
        require(source is not None, f"{node.name} is a module's own under another name")
        assert source is not None
        return self.expansion.input_for(theirs, node, source)

    def _source(self, source: str) -> str | None:
        """Return the source of what corresponds, for what belongs to the traced module alone."""
        repeat, mine, theirs = self.expansion.repeat, self.region.entered.args[0], self.mark.args[0]
        assert isinstance(mine, int)
        assert isinstance(theirs, int)
        for old, new in zip(repeat.prefixes(mine), repeat.prefixes(theirs), strict=True):
            if source.startswith(old) and source[len(old) : len(old) + 1] in (".", "["):
                return new + source[len(old) :]
        return None


def require(condition: bool, otherwise: str) -> None:
    """Check a condition under which a trace is good for twins.

    Raises:
        NotRepeatedError: It does not hold; `otherwise` is the message.
    """
    if not condition:
        raise NotRepeatedError(otherwise)


def parts_of(left: fx.Node) -> tuple[fx.Node | None, ...]:
    """Return the parts of what a module gives, by the mark where it ends."""
    result: Any = left.args[1]
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def stream_of(mark: fx.Node) -> fx.Node:
    """Return the first argument of the module that a mark is about."""
    stream = mark.args[1][0]  # type: ignore[index]
    assert isinstance(stream, fx.Node)
    return stream


def is_size(node: fx.Node) -> bool:
    """Return whether a node's value is a number or a shape.

    These are the same for all modules that see the same lengths.

    """
    value = node.meta.get("example_value")
    numbers = value if isinstance(value, tuple) else (value,)
    return all(isinstance(n, int | float | torch.SymInt | torch.SymFloat) for n in numbers)


def _description(node: fx.Node) -> tuple[Any, ...]:
    """Return what a trace may depend on; sizes as text, because comparing them records guards."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return type(value), str(value)
    sizes = str(tuple(value.shape)), str(value.stride()), str(value.storage_offset())
    return *sizes, value.dtype, value.device, value.requires_grad


def _correspond(one: Any, other: Any, passed_for: dict[fx.Node, fx.Node]) -> None:
    """Pair the nodes among two modules' arguments; all else must be equal."""
    require(type(one) is type(other), "modules are called with different arguments")
    if isinstance(one, fx.Node):
        alike = _description(one) == _description(other)
        require(alike, f"modules are called with {one.name} and {other.name}, which differ")
        require(
            passed_for.setdefault(one, other) is other, f"{one.name} is given for two arguments"
        )
    elif isinstance(one, list | tuple):
        require(len(one) == len(other), "modules are called with different arguments")
        for mine, theirs in zip(one, other, strict=True):
            _correspond(mine, theirs, passed_for)
    elif isinstance(one, dict):
        _correspond(list(one), list(other), passed_for)
        _correspond(list(one.values()), list(other.values()), passed_for)
    else:
        require(one == other, f"modules are called with {one!r} and {other!r}")


def _renaming(one: fx.Node, other: fx.Node) -> Callable[[dict[Any, Any]], dict[Any, Any]]:
    """Return a function from a node's module stack inside one module to that inside the other."""

    def path(node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack")
        return str(next(reversed(stack.values()))[0]) if stack else ""

    old, new = path(one), path(other)

    @functools.cache
    def renamed(text: str) -> str:
        return new + text[len(old) :] if text.startswith(old) else text

    return lambda stack: {k: (renamed(text), kind) for k, (text, kind) in stack.items()}
