"""The ways in which models write residual adds, all written as the one that sublayers have."""

from __future__ import annotations

from torch import fx

from ..infra.pass_base import Pass
from ..infra.pass_manager import run_passes
from .serialize_branches import SerializeBranches
from .unflatten import Unflatten
from .upcast import Upcast

#: In this order: each finds the residual adds that the one before has brought into shape.
CANONICAL: tuple[Pass, ...] = (Unflatten(), Upcast(), SerializeBranches())


def canonicalize(graph_module: fx.GraphModule) -> None:
    """Rewrite a captured graph in place so that every residual add is one of the stream itself.

    Over flattened tokens, in a wider dtype than the embedding's, or several branches at once: each
    becomes ``x + f(x)`` in the stream's own shape and dtype. What does not is refused by
    :func:`find_sublayers`.

    Args:
        graph_module: As captured.
    """
    run_passes(graph_module, CANONICAL, copy=False)
