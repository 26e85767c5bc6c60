"""Replace the marks that :mod:`mark` left in a captured graph by what they stand for.

What was traced of a module lies between two marks. A copy of it (:mod:`copies`) is the same
operations, in which what the module was called with, and what belongs to it, is replaced by the
twin's.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..._torch import fake_like
from ...infra.pass_base import Pass, PassResult
from .copies import Copy, Region, is_size, parts_of, require, stream_of
from .mark import MARKS, First, Repeat, seconds_of


@dataclass(frozen=True)
class Expand(Pass):
    """Pass over a captured graph with marks: replace them. Its changes are copied modules.

    Attributes:
        sources: Of the graph's placeholders; changed as these are.
        value_of: The value of a source, by the arguments that were captured.
        repeat: The modules, as they were marked.
        first: Which of them were traced, as they were marked.
    """

    sources: dict[fx.Node, str]
    value_of: Callable[[str], Any]
    repeat: Repeat
    first: First

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Replace the marks; see :class:`Pass`.

        Raises:
            NotRepeatedError: The trace of one module is not good for its twins.
        """
        expansion = Expansion(graph_module.graph, self.sources, self.value_of, self.repeat)
        expansion.run(self.first)
        return PassResult(graph_module, len(self.first))


class Expansion:
    """The expansion of one captured graph."""

    def __init__(
        self,
        graph: fx.Graph,
        sources: dict[fx.Node, str],
        value_of: Callable[[str], Any],
        repeat: Repeat,
    ) -> None:
        self.graph = graph
        self.sources = sources
        self.value_of = value_of
        self.repeat = repeat
        self.real = {n: value_of(source) for n, source in sources.items() if not is_size(n)}
        self.input_of = {id(value): node for node, value in self.real.items()}

    def run(self, first: First) -> None:
        """Replace all marks.

        Args:
            first: Which modules were traced, as they were marked.

        Raises:
            NotRepeatedError: The trace of one module is not good for its twins.
        """
        entered, left, stood_in = (self._marks(mark) for mark in MARKS)
        seconds = seconds_of(first)
        traced = {*seconds, *seconds.values()}
        called = (
            entered.keys() == left.keys() == traced and stood_in.keys() == first.keys() - traced
        )
        require(called, "a module is not called")
        idle = [n for n in self.sources if n.users and all(u.target in MARKS for u in n.users)]
        regions = {r: Region.between(entered[r], left[r]) for r in traced}
        for r, k in seconds.items():
            Copy(self, regions[r], entered[k], first[k][1]).compare(regions[k])
        for k, mark in stood_in.items():
            r, correspondence = first[k]
            _bypass(mark, Copy(self, regions[r], mark, correspondence).made())
        for region in regions.values():
            _bypass(region.left, parts_of(region.left))
            _bypass(region.entered, (stream_of(region.entered),))
        for node in idle:
            if not node.users:  # an input that only marks had: Dynamo leaves out what nobody reads
                self.graph.erase_node(node)
                del self.sources[node]

    def _marks(self, mark: Callable[..., Any]) -> dict[Any, fx.Node]:
        nodes = self.graph.find_nodes(op="call_function", target=mark)
        found = {n.args[0]: n for n in nodes}
        require(len(found) == len(nodes), "a module is called more than once")
        return found

    def input_for(self, value: torch.Tensor, like: fx.Node, source: str) -> fx.Node:
        """Return the placeholder of a tensor, or a new one that is described as `like` is."""
        node = self.input_of.get(id(value))
        if node is None:
            require(self.value_of(source) is value, f"{source} is not what corresponds")
            with self.graph.inserting_after(next(reversed(self.sources))):
                node = self.graph.placeholder(
                    re.sub(r"[^a-zA-Z0-9]+", "_", source).replace("L", "l", 1)
                )
            node.meta = {k: v for k, v in like.meta.items() if k != "grapharg"}
            node.meta["example_value"] = fake_like(like.meta["example_value"])
            self.sources[node], self.real[node], self.input_of[id(value)] = source, value, node
        return node


def _bypass(mark: fx.Node, parts: tuple[fx.Node | None, ...]) -> None:
    """Let what was computed be read where a mark was: it, or what is taken out of it."""
    if not isinstance(mark.meta["example_value"], tuple):
        require(len(parts) == 1, "a module is called before its twin, and gives several things")
        mark.replace_all_uses_with(parts[0])  # type: ignore[arg-type]
    for taken in list(mark.users):
        require(taken.target is operator.getitem, "what a module gives is read as a whole")
        taken.replace_all_uses_with(parts[taken.args[1]])  # type: ignore[arg-type, index]
        mark.graph.erase_node(taken)
    mark.graph.erase_node(mark)
