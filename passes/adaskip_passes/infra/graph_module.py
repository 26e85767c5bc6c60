"""What the pass manager does with graph modules of every kind: copy, check and show them."""

from __future__ import annotations

from typing import Any

from torch import fx


class Uncoded(fx.GraphModule):
    """A GraphModule whose code is not generated, because nothing runs it.

    A GraphModule generates code whenever its graph is set, which takes longer than rewriting the
    graph; :func:`adaskip_passes.link` makes its own program, and a piece is compiled from a copy.

    A subclass may override `copied`, `check` and `text`.
    """

    def recompile(self) -> Any:
        """Do nothing: see the class."""

    def forward(self, *args: Any) -> Any:
        """Run node by node, for debugging."""
        return fx.Interpreter(self).run(*args)

    def copied(self) -> Uncoded:
        """Return a copy whose graph can be changed; what the graph calls is shared."""
        return Uncoded(self, _copied_graph(self.graph), type(self).__name__)

    def check(self) -> None:
        """Check that the graph is well-formed.

        Raises:
            RuntimeError: It is not.
        """
        self.graph.lint()

    def text(self) -> str:
        """Return the graph for people to read."""
        return str(self.graph)


def copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `graph_module` whose graph can be changed; what it calls is shared."""
    if isinstance(graph_module, Uncoded):
        return graph_module.copied()
    graph = _copied_graph(graph_module.graph)
    return fx.GraphModule(graph_module, graph, type(graph_module).__name__)


def check(graph_module: fx.GraphModule) -> None:
    """Check that a graph is well-formed.

    Raises:
        RuntimeError: It is not.
    """
    if isinstance(graph_module, Uncoded):
        graph_module.check()
    else:
        graph_module.graph.lint()


def text(graph_module: fx.GraphModule) -> str:
    """Return a graph for people to read.

    An outer graph has one line for each call, without weights, slots of the cache and lengths.
    """
    if isinstance(graph_module, Uncoded):
        return graph_module.text()
    return str(graph_module.graph)


def _copied_graph(source: fx.Graph) -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.graph_copy(source, {}))
    return graph
