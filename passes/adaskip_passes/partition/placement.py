"""Where each node of a captured graph goes when it is cut: which piece computes it.

Legal because every node stays after what it reads, and reads and writes of mutated storage keep
their order, which is checked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from torch import fx

from ..analysis.effects import (
    AUTOCAST_ENDS,
    accesses,
    is_mutation,
    operation,
    storage_root,
    written,
)
from ..analysis.residual_branches import ATTENTION_OPERATIONS, ResidualBranch
from ..analysis.stream import stream_levels
from ..errors import UnsupportedError


def assign_partitions(graph: fx.Graph, sublayers: Sequence[ResidualBranch]) -> dict[fx.Node, int]:
    """Return the piece of each node: 0 the prologue, k + 1 sublayer k, S + 1 the epilogue.

    What does not depend on the stream belongs to the prologue, unless one piece alone needs it:
    then it is computed there (and goes when that sublayer is skipped). What is made of the
    embedding alone, and read by later sublayers as well, belongs to the prologue too. What is made
    of the stream aside of a branch (another head's logits) belongs to who reads it.
    """
    levels = stream_levels(graph, [(s.stream, s.add) for s in sublayers])
    inner = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    partition = {n: levels[n] + 1 for n in inner}
    pinned = (
        _place_autocast(inner, partition) | _overwritten(inner, partition) | {sublayers[0].stream}
    )
    _place_of_embedding(inner, partition, pinned | {sublayers[0].add})
    _place_asides(inner, partition, pinned, sublayers)
    for node in reversed(inner):
        needed_by = {partition[u] for u in node.users if u in partition}
        if (
            partition[node] == 0
            and node not in pinned
            and len(needed_by) == 1
            and _inner_only(node)
        ):
            partition[node] = needed_by.pop()
    _place_free_writes(inner, partition)
    _place_unread([n for n in inner if n not in pinned], partition)
    _check_order(inner, partition)
    return partition


def _overwritten(inner: Sequence[fx.Node], partition: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Return what the prologue makes and then overwrites (a table by entries), and its readers."""
    root_of = functools.cache(storage_root)
    roots = {r for n in inner if (r := written(n)) is not None and partition.get(r) == 0}
    reads = (n for n in inner if any(root_of(i) in roots for i in n.all_input_nodes))
    return roots | {n for n in reads if partition[n] == 0}


def _place_of_embedding(
    inner: Sequence[fx.Node], partition: dict[fx.Node, int], pinned: set[fx.Node]
) -> None:
    """Move what later pieces read of the first to the prologue, where the embedding is made."""
    roots = {r for n in inner if (r := written(n)) is not None}

    def movable(node: fx.Node) -> bool:
        attends = operation(node) in ATTENTION_OPERATIONS
        return node not in pinned and not attends and _is_pure(node, roots)

    for node in inner:
        if partition[node] != 1 or all(partition.get(u, 1) <= 1 for u in node.users):
            continue
        wanted, group = [node], dict[fx.Node, None]()
        while wanted:
            member = wanted.pop()
            group[member] = None
            wanted += [
                i for i in member.all_input_nodes if partition.get(i) == 1 and i not in group
            ]
        if all(map(movable, group)):
            partition.update(dict.fromkeys(group, 0))


def _place_asides(
    inner: Sequence[fx.Node],
    partition: dict[fx.Node, int],
    pinned: set[fx.Node],
    sublayers: Sequence[ResidualBranch],
) -> None:
    """Move what a piece computes for later ones alone to the first of these."""
    roots = {r for n in inner if (r := written(n)) is not None}
    adds = {s.add for s in sublayers}
    for node in reversed(inner):
        readers = [partition.get(user, len(sublayers) + 1) for user in node.users]
        aside = 0 < partition[node] < min(readers, default=0) and node not in adds
        if aside and node not in pinned and _is_pure(node, roots):
            partition[node] = min(readers)


def _is_pure(node: fx.Node, overwritten: set[fx.Node]) -> bool:
    """Return whether a node has no effect and reads nothing that is ever overwritten."""
    reads = {storage_root(i) for i in (node, *node.all_input_nodes)}
    return not is_mutation(node) and not reads & overwritten


def _place_autocast(inner: Sequence[fx.Node], partition: dict[fx.Node, int]) -> set[fx.Node]:
    """Keep autocast regions whole: their two ends go where what they enclose is.

    Returns:
        The nodes of all regions, which must not be moved out of them.
    """
    order = {node: i for i, node in enumerate(inner)}
    pinned: set[fx.Node] = set()
    for enter in inner:
        if operation(enter) != "_enter_autocast":
            continue
        leave = next(u for u in enter.users if operation(u) == "_exit_autocast")
        region = inner[order[enter] : order[leave] + 1]
        partitions = {partition[n] for n in region[1:-1] if operation(n) not in AUTOCAST_ENDS}
        if len(partitions) > 1:
            raise UnsupportedError(
                f"an autocast region ({enter.name}) reaches over several sublayers of the model"
            )
        partition[enter] = partition[leave] = partitions.pop() if partitions else 0
        pinned.update(region)
    return pinned


def _inner_only(node: fx.Node) -> bool:
    return all(user.op != "output" for user in node.users) and written(node) is None


def _place_free_writes(inner: Sequence[fx.Node], partition: dict[fx.Node, int]) -> None:
    """Place a write that depends on no stream (a length counter) where its storage is last read.

    One that nobody reads stays where it was in the program.

    """
    at = 0
    for node in inner:
        root = written(node)
        if root is not None and partition[node] == 0 and not node.users:
            before = [partition[a] for a in accesses(inner, root) if a is not node]
            partition[node] = max(before, default=at)
        at = partition[node] or at


def _place_unread(inner: Sequence[fx.Node], partition: dict[fx.Node, int]) -> None:
    """Leave what nobody reads and writes nothing (a logging call) where it was in the program."""
    at = 0
    for node in inner:
        if partition[node] == 0 and not node.users and written(node) is None:
            partition[node] = at
        at = partition[node] or at


def _check_order(inner: Sequence[fx.Node], partition: Mapping[fx.Node, int]) -> None:
    """Check that accesses to storage that something writes to stay in the order of the program."""
    partitions: dict[fx.Node, list[int]] = {r: [] for n in inner if (r := written(n)) is not None}
    root_of = functools.cache(storage_root)
    for node in inner:
        for root in {root_of(i) for i in node.all_input_nodes} & partitions.keys():
            partitions[root].append(partition[node])
    for root, ordered in partitions.items():
        if ordered != sorted(ordered):
            raise UnsupportedError(
                f"{root.name} is written in place and read by several sublayers in an order that "
                "cutting the graph would change."
            )


def in_place_adds(graph: fx.Graph, sublayers: Sequence[ResidualBranch]) -> set[fx.Node]:
    """Return the adds that overwrite the stream they read (``x += branch``).

    In their pieces they become plain adds, so that the stream before a sublayer is still there
    after it, to be measured. Nothing may read the overwritten tensor by its old name.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    found = set()
    for s in sublayers:
        target = s.add.args[0]
        if not is_mutation(s.add) or not isinstance(target, fx.Node):
            continue
        if storage_root(target) is not storage_root(s.stream):
            continue  # it overwrites the branch, which nobody else has
        root = storage_root(target)
        names = [n for n in graph.nodes if order[n] < order[s.add] and storage_root(n) is root]
        if any(order[user] > order[s.add] for name in names for user in name.users):
            raise UnsupportedError(
                f"{s.path}: the residual stream is overwritten in place and read afterwards by "
                "its old name"
            )
        found.add(s.add)
    return found
