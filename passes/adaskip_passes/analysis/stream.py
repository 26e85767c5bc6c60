"""What of a graph depends on the residual stream, and on the stream at which point."""

from __future__ import annotations

from torch import fx

from .effects import dependencies


def stream_levels(graph: fx.Graph, chain: list[tuple[fx.Node, fx.Node]]) -> dict[fx.Node, int]:
    """Return for each node the sublayer that it is computed in.

    Args:
        graph: the captured graph.
        chain: (stream, add) of each of the S sublayers.

    Returns:
        -1 for what does not depend on the residual stream (and for the embedding, where the
        stream begins), k for what depends on the stream before sublayer k and on no later one,
        S for what follows the last sublayer.
    """
    made_at = {add: k for k, (_, add) in enumerate(chain)}
    value_level: dict[fx.Node, int] = {}  # the stream that a node's value depends on
    level: dict[fx.Node, int] = {}
    for node, sources in dependencies(graph.nodes).items():
        depends = max((value_level[i] for i in sources), default=-1)
        level[node] = depends
        value_level[node] = made_at[node] + 1 if node in made_at else depends
        if node is chain[0][0]:
            value_level[node] = 0
    return level


def stream_independent(graph: fx.Graph, stream: fx.Node) -> set[fx.Node]:
    """Return the nodes of a piece that do not depend on the residual stream `stream`."""
    dependent = {stream}
    for node, sources in dependencies(graph.nodes).items():
        if any(source in dependent for source in sources):
            dependent.add(node)
    return {node for node in graph.nodes if node not in dependent}
