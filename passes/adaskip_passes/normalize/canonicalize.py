"""The ways in which models write residual adds, all written as the one that sublayers have."""

from __future__ import annotations

from torch import fx

from .serialize_branches import separate
from .unflatten import unflatten
from .upcast import widen


def canonicalize(graph: fx.Graph) -> None:
    """Rewrite a captured graph in place so that every residual add is one of the stream itself.

    Over flattened tokens, in a wider dtype than the embedding's, or several branches at once: each
    becomes ``x + f(x)`` in the stream's own shape and dtype. What does not is refused by
    :func:`find_sublayers`.
    """
    unflatten(graph)
    widen(graph)
    separate(graph)
