"""The interface that every rewrite of a graph has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    ``torch.fx.passes.infra.pass_base.PassResult`` has the same two parts, but says only whether
    something changed; logs and tests want to know how much.

    Attributes:
        graph_module: The module that the pass was called with, changed in place.
        changes: How many places were rewritten. What a place is, the pass says; 0 means that the
            graph is as it was.
    """

    graph_module: fx.GraphModule
    changes: int

    @property
    def modified(self) -> bool:
        """Whether the graph changed."""
        return self.changes > 0


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a graph: a frozen dataclass whose fields are its options.

    A pass only rewrites and reports. What is around it (copying, linting, timing, dumps, diffs) is
    done by :func:`adaskip_passes.infra.pass_manager.run_passes`.
    """

    @property
    def name(self) -> str:
        """The name of the pass in logs and dumps: that of its class."""
        return type(self).__name__

    @abstractmethod
    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite a graph in place.

        Args:
            graph_module: A captured graph, an outer graph or the graph of a piece, whichever the
                pass is for.

        Returns:
            The same module, and how many places were rewritten.

        Raises:
            UnsupportedError: The rewrite cannot be proven to be right for this graph.
        """
