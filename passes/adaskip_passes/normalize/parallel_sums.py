"""Find the sums of the stream and several branches that can be written one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..analysis.effects import is_mutation, operation, storage_root, written
from ..analysis.residual_adds import (
    ancestors_of,
    branch_path,
    is_add,
    module_path,
    root_of,
    shape_of,
)


@dataclass(frozen=True)
class ParallelSum:
    """A sum of the stream and of branches that all read it.

    Attributes:
        total: the outermost add.
        inner: what else is left out: the adds inside of it, and dropouts around these.
        residual: the term that is the stream; `stream`: the node that made it.
        branches: the other terms by the module that they come from, in the order in which they are
            to be added; those with effects first.
        regions: for each branch the nodes between the stream and its terms, and its writes, in
            graph order.
    """

    total: fx.Node
    inner: tuple[fx.Node, ...]
    residual: fx.Node
    stream: fx.Node
    branches: tuple[tuple[fx.Node, ...], ...]
    regions: tuple[tuple[fx.Node, ...], ...]


def find_sums(graph: fx.Graph) -> list[ParallelSum]:
    """Return the sums of a captured graph that can be serialized, in graph order."""
    return _Finder(graph).sums()


class _Finder:
    """A search for sums of several branches, in a graph that is not changed meanwhile."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.ancestors = ancestors_of(graph)
        self.writes = [node for node in self.nodes if written(node) is not None]
        self.autocast = _autocast_regions(self.nodes)

    def sums(self) -> list[ParallelSum]:
        found, inside = [], set[fx.Node]()
        for node in reversed(self.nodes):
            if is_add(node) and node not in inside and (found_sum := self._sum(node)):
                found.append(found_sum)  # not what is inside of one: it is moved with its branch
                inside.update(found_sum.inner, *found_sum.regions)
        return found[::-1]

    def _depends(self, node: fx.Node, on: fx.Node) -> bool:
        return bool(self.ancestors[node] >> self.order[on] & 1)

    def _sum(self, total: fx.Node) -> ParallelSum | None:
        inner: list[fx.Node] = []
        shape = shape_of(total)
        terms = _terms(total, total, inner) if shape is not None else []
        if len(terms) < 3 or any(shape_of(term) != shape for term in terms):
            return None
        for residual in terms:
            stream, others = root_of(residual), [t for t in terms if t is not residual]
            if all(root_of(t) is not stream and self._depends(t, stream) for t in others):
                return self._branches(total, inner, residual, stream, others)
        return None

    def _branches(
        self,
        total: fx.Node,
        inner: Sequence[fx.Node],
        residual: fx.Node,
        stream: fx.Node,
        terms: Sequence[fx.Node],
    ) -> ParallelSum | None:
        by_path: dict[str, list[fx.Node]] = {}
        for term in sorted(terms, key=self.order.__getitem__):
            by_path.setdefault(branch_path(total, term), []).append(term)
        branches = [tuple(group) for group in by_path.values()]
        if len(branches) < 2 or self._overwrites_read(total):
            return None
        regions = [self._region(stream, group) for group in branches]
        writes = [w for w in self.writes if w not in inner and not self._depends(w, total)]
        effects = [self._effects(i, regions, writes) for i in range(len(branches))]
        if len({w for group in effects for w in group}) < sum(map(len, effects)):
            return None  # one write of several branches
        regions = [
            self._region(stream, (*group, *acts))
            for group, acts in zip(branches, effects, strict=True)
        ]
        ranked = sorted(range(len(branches)), key=lambda i: not effects[i])
        if not all(self._moves(regions[i], effects[i], writes, total) for i in ranked[1:]):
            return None
        return ParallelSum(
            total,
            tuple(inner),
            residual,
            stream,
            tuple(branches[i] for i in ranked),
            tuple(regions[i] for i in ranked),
        )

    def _region(self, stream: fx.Node, ends: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        bits = 0
        for end in ends:
            bits |= self.ancestors[end]
        between = self.nodes[self.order[stream] + 1 : max(map(self.order.__getitem__, ends)) + 1]
        return tuple(n for n in between if bits >> self.order[n] & 1 and self._depends(n, stream))

    def _effects(
        self, index: int, regions: Sequence[tuple[fx.Node, ...]], writes: Sequence[fx.Node]
    ) -> list[fx.Node]:
        """Return the writes of what only this branch computes, also on a side branch."""
        shared = {n for i, region in enumerate(regions) if i != index for n in region}
        alone = {n for n in regions[index] if n not in shared}
        bits = sum(1 << self.order[n] for n in alone)
        return [w for w in writes if self.ancestors[w] & bits and not _is_local(w, alone)]

    def _moves(
        self,
        region: Sequence[fx.Node],
        effects: Sequence[fx.Node],
        writes: Sequence[fx.Node],
        total: fx.Node,
    ) -> bool:
        """Return whether a branch computes and writes the same directly before `total`."""
        inside, begin, end = set(region), self.order[region[0]], self.order[total]
        read = {storage_root(i) for node in region for i in node.all_input_nodes}
        behind = [w for w in writes if begin < self.order[w] < end and w not in inside]
        mine = {written(w) for w in effects}
        others = (n for n in self.nodes[begin:end] if n not in inside and _reads(n))
        seen = any(storage_root(i) in mine for n in others for i in n.all_input_nodes)
        acts = any(is_mutation(n) and not _is_local(n, inside) and n not in effects for n in region)
        cast = any(self.autocast[n] != self.autocast[total] for n in region)
        return not (acts or seen or cast or any(written(w) in read for w in behind))

    def _overwrites_read(self, total: fx.Node) -> bool:
        """Return whether an add in place has a target that is read afterwards by an older name."""
        if not is_mutation(total):
            return False
        root, end = storage_root(total), self.order[total]
        names = (n for n in self.nodes[:end] if storage_root(n) is root)
        return any(self.order[user] > end for name in names for user in name.users)


def _autocast_regions(nodes: Sequence[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return for each node the autocast regions around it, by the nodes that enter them."""
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    now: tuple[fx.Node, ...] = ()
    for node in nodes:
        if operation(node) == "_exit_autocast":
            now = tuple(entered for entered in now if entered is not node.args[0])
        elif operation(node) == "_enter_autocast":
            now = (*now, node)
        found[node] = now
    return found


def _reads(node: fx.Node) -> bool:
    """Return whether a node looks at its inputs' storage: taking a view of it does not."""
    return is_mutation(node) or storage_root(node) is node


def _is_local(write: fx.Node, region: set[fx.Node]) -> bool:
    """Return whether a write is to what the region itself has made (an activation in place)."""
    return write in region and written(write) in region


def _terms(node: fx.Node, total: fx.Node, inner: list[fx.Node]) -> list[fx.Node]:
    """Return the terms of a sum; its inner nodes are added to `inner`."""
    undropped, dropped = node, list[fx.Node]()
    while operation(undropped) == "dropout" and len(undropped.users) == 1 and _is_idle(undropped):
        dropped.append(undropped)
        undropped = undropped.all_input_nodes[0]
    mine = undropped is total or (
        is_add(undropped)
        and len(undropped.users) == 1
        and module_path(undropped) == module_path(total)
        and shape_of(undropped) == shape_of(total)
        and _is_finer(total.meta["example_value"].dtype, undropped.meta["example_value"].dtype)
    )
    if not mine or (undropped is not total and _target_is_read(undropped)):
        return [node]
    if undropped is not total:
        inner += [*dropped, undropped]
    left, right = undropped.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return _terms(left, total, inner) + _terms(right, total, inner)


def _is_finer(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Return whether sums in `dtype` lose nothing that sums in `other` keep.

    Under autocast branches are added to each other in half precision, and to the stream in full.
    """
    return torch.promote_types(dtype, other) == dtype


def _is_idle(dropout: fx.Node) -> bool:
    """Return whether a dropout gives its input, as in evaluation mode."""
    return dropout.kwargs.get("training", dropout.args[2:3]) in (False, (False,))


def _target_is_read(node: fx.Node) -> bool:
    """Return whether an add is in place (Falcon) and its target is read by others as well."""
    return is_mutation(node) and any(user is not node for user in node.all_input_nodes[0].users)
