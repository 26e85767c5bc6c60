"""Run passes over an outer graph: this place alone copies, lints, times, dumps and diffs.

A pass is a frozen dataclass whose fields are its options and which, called, changes the graph that
it is given. A pipeline is a tuple of passes.
"""

from __future__ import annotations

import difflib
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from ..partition.outline import CAPTURED, Outer, piece_of

Pass = Callable[[fx.GraphModule], None]


@dataclass(frozen=True)
class Step:
    """What one pass did, for whoever watches.

    Attributes:
        name: the class of the pass.
        seconds: how long it ran.
        before, after: the outer graph as text.
    """

    name: str
    seconds: float
    before: str
    after: str

    def diff(self) -> str:
        """The change as a unified diff of the outer graph's text."""
        lines = difflib.unified_diff(
            self.before.splitlines(), self.after.splitlines(), "before", self.name, lineterm=""
        )
        return "\n".join(lines)


def run_passes(
    outer: fx.GraphModule, passes: Sequence[Pass], watch: Callable[[Step], None] | None = None
) -> Outer:
    """A changed copy of `outer`; the original stays as it is.

    Args:
        outer: the outer graph.
        passes: called in order on the copy.
        watch: receives a `Step` after each pass. Without it no text is made, which matters:
            specialising must take milliseconds.

    Raises:
        UnsupportedError: from a pass.
        RuntimeError: a pass left an ill-formed graph.
    """
    changed = copy(outer)
    for one in passes:
        before = text(changed) if watch else ""
        start = time.perf_counter()
        one(changed)
        seconds = time.perf_counter() - start
        _lint(changed)
        if watch:
            watch(Step(type(one).__name__, seconds, before, text(changed)))
    return changed


def copy(outer: fx.GraphModule) -> Outer:
    """A graph that can be changed without the original; the pieces are shared."""
    graph = fx.Graph()
    result = graph.graph_copy(outer.graph, {})
    graph.output(result)
    return Outer(outer, graph, "Outer")


def text(outer: fx.GraphModule) -> str:
    """The outer graph for people: one line a call; weights, cache slots and lengths left out."""
    lines = []
    for node in outer.graph.nodes:
        if node.op == "call_module" or (node.op == "call_function" and not _unpacks(node)):
            piece = piece_of(node)
            name = piece.name if piece else getattr(node.target, "__name__", str(node.target))
            lines.append(f"{_results(node)} = {name}({_arguments(node)})")
    lines.append(f"return {outer.graph.output_node().args[0]}")
    return "\n".join(lines)


def _unpacks(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _results(node: fx.Node) -> str:
    """What a call's value is called, or its values if it is unpacked."""
    items = sorted((u for u in node.users if _unpacks(u)), key=_place)
    return ", ".join(u.name for u in items) or node.name


def _place(item: fx.Node) -> int:
    place = item.args[1]
    assert isinstance(place, int)
    return place


def _arguments(node: fx.Node) -> str:
    shown = [str(a) for a in node.args if not (isinstance(a, fx.Node) and a.meta.get(CAPTURED))]
    hidden = len(node.args) - len(shown)
    return ", ".join([*shown, f"+{hidden} inputs"] if hidden else shown)


def _lint(outer: fx.GraphModule) -> None:
    outer.graph.lint()
    for node in outer.graph.find_nodes(op="call_module"):
        if piece_of(node) is None:
            raise RuntimeError(f"{node.name} calls {node.target}, which is not a piece")
