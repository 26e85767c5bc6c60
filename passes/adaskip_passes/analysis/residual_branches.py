"""Find the residual sublayers of a captured decoder, by structure first and module path second.

A sublayer maps the residual stream ``x`` to ``x + f(x)``. In the graph that is an add whose one
operand is an ancestor of the other; a decoder is the chain of such adds in which each one's
residual is the result of the one before. What kind of sublayer it is follows from what it does
(attention writes K/V or calls an attention operator); the module path must not say otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import fx

from ..errors import UnsupportedError
from .effects import operation, written
from .residual_adds import (
    Residual,
    ancestors_of,
    branch_path,
    is_add,
    is_plain_add,
    module_path,
    residual_of,
    root_of,
    shape_of,
    unscaled,
)
from .stream import stream_levels

ATTENTION_OPERATIONS = frozenset(
    {
        *("scaled_dot_product_attention", "flex_attention"),
        *("attend.default", "attend_causal.default", "attend_packed.default"),
        *("attend_windowed.default", "attend_packed_windowed.default"),
        *("attend_masked_windowed.default", "attend_latent.default"),
    }
)

#: What a module's name says about the kind of sublayer it belongs to; first match counts.
KIND_BY_NAME: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "mixer": re.compile(r"mamba|ssm|linear_attn|short_conv|recurrent"),
        "attention": re.compile(r"attn|attention"),
        "ffn": re.compile(r"mlp|ffn|feed_forward|moe|expert|^fc\d$"),
    }
)


@dataclass(frozen=True)
class ResidualBranch:
    """One residual branch of a captured graph.

    Attributes:
        index: position along the stream, from 0.
        layer: the decoder layer it belongs to, from its module path.
        kind: ``attention``, ``ffn`` or ``mixer``.
        path: module path of the branch, for messages (``model.layers.3.self_attn``).
        modules: the innermost modules that the branch comes out of (``….self_attn.o_proj``);
            several where their sum is the branch (routed and shared experts).
        add: the node that adds the branch to the stream.
        stream: the node that produced the stream which the sublayer reads: the add of the
            sublayer before, or the embedding.
        branch: the operand of `add` that is not the residual.
    """

    index: int
    layer: int
    kind: str
    path: str
    modules: tuple[str, ...]
    add: fx.Node
    stream: fx.Node
    branch: fx.Node

    @property
    def name(self) -> str:
        """The name of its piece: ``layers_3_attention``."""
        return f"layers_{self.layer}_{self.kind}"


def find_sublayers(graph: fx.Graph) -> tuple[ResidualBranch, ...]:
    """Return the residual sublayers of a captured decoder, in stream order.

    Raises:
        UnsupportedError: no residual stream, two candidates for it, a branch whose kind cannot be
            told, or attention that is not inside a residual branch.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    ancestors = ancestors_of(graph)
    residuals = [r for node in graph.nodes if (r := residual_of(node, order, ancestors))]
    chain = _longest_chain(residuals, order, ancestors)
    if not chain:
        raise UnsupportedError(
            "no residual stream found: no add in the graph has one operand that is an ancestor of "
            "the other. Only decoders made of x + f(x) sublayers can be skipped."
        )
    regions = _regions(graph, chain)
    adds = {residual.add for residual in chain}
    writes = ((n, written(n)) for n in graph.nodes if n not in adds)
    later = {root: node for node, root in writes if root is not None}
    found = []
    for index, (residual, region) in enumerate(zip(chain, regions, strict=True)):
        path = branch_path(residual.add, residual.branch)
        layer = _layer(path)
        if layer is None:
            raise UnsupportedError(
                f"sublayer {index} of the residual stream has no layer number in its module path "
                f"({path or 'no path'}); put decoder layers into a ModuleList."
            )
        kind = _kind([n for n in region if n is not residual.add], path)
        _refuse_other_stream(residual, path)
        _refuse_parallel(residual, order, ancestors, layer)
        modules = tuple(dict.fromkeys(_modules(residual.branch, module_path(residual.add), later)))
        found.append(
            ResidualBranch(
                index, layer, kind, path, modules, residual.add, residual.stream, residual.branch
            )
        )
    _refuse_attention_outside(graph, regions)
    _refuse_duplicates(found)
    return tuple(found)


def _modules(branch: fx.Node, layer: str, later: Mapping[fx.Node, fx.Node]) -> list[str]:
    """Return the modules that a branch comes out of; those of its terms, if the layer adds them.

    Args:
        branch: The branch.
        layer: The path of the layer.
        later: For a node whose value is overwritten, the last node that does so.

    """
    source = unscaled(branch)
    source = later.get(source, source)
    path = module_path(source)
    if path != layer or not is_add(source):
        return [path]
    return [p for term in source.all_input_nodes for p in _modules(term, layer, later)]


def _longest_chain(
    residuals: list[Residual], order: Mapping[fx.Node, int], ancestors: Mapping[fx.Node, int]
) -> list[Residual]:
    """Return the chain of residual adds in which each one's stream is the add before it."""
    by_add = {r.add: r for r in residuals}
    length: dict[fx.Node, int] = {}
    for r in residuals:  # graph order, so the stream's own length is known
        length[r.add] = 1 + length.get(r.stream, 0)
    if not length:
        return []
    longest = max(length.values())
    chains = [_chain_to(by_add[add], by_add) for add, n in length.items() if n == longest]
    if len(chains) > 1:
        places = ", ".join(_place(chain[-1].add) for chain in chains)
        first, start = chains[0][-1].add, chains[1][0].stream
        why = ""
        if ancestors[start] >> order[first] & 1:
            why = (
                f" ({operation(start)} in {_place(start)} changes what the first gives before the "
                "next begins, and is no residual add)"
            )
        raise UnsupportedError(
            f"{len(chains)} chains of {longest} residual adds are equally long, ending at "
            f"{places}; which one is the residual stream cannot be told{why}."
        )
    return chains[0]


def _chain_to(end: Residual, by_add: Mapping[fx.Node, Residual]) -> list[Residual]:
    chain, residual = [], by_add.get(end.add)
    while residual is not None:
        chain.append(residual)
        residual = by_add.get(residual.stream)
    return chain[::-1]


def _place(node: fx.Node) -> str:
    return module_path(node) or node.name


def _regions(graph: fx.Graph, chain: list[Residual]) -> list[list[fx.Node]]:
    """Return for each residual the nodes that depend on its stream and on no later one."""
    level = stream_levels(graph, [(r.stream, r.add) for r in chain])
    regions: list[list[fx.Node]] = [[] for _ in chain]
    for node in graph.nodes:
        at = level[node]
        if 0 <= at < len(chain) and node.op != "output":
            regions[at].append(node)
    return regions


def _layer(path: str) -> int | None:
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(number[1]) if number else None


def _kind(region: list[fx.Node], path: str) -> str:
    """Return the kind of sublayer that a region is, by what it does; its name must not contradict.

    Attention calls an attention operator, or appends to storage; a mixer overwrites a state. Some
    mixers are called as attention is, so a name tells these two apart only where a part of a state
    is written.

    Raises:
        UnsupportedError: The name says something else.

    """
    attends = any(operation(n) in ATTENTION_OPERATIONS for n in region)
    writes = [n for n in region if (w := written(n)) is not None and w.op == "placeholder"]
    tail = path.rsplit(".", 1)[-1].lower()
    named = next((kind for kind, name in KIND_BY_NAME.items() if name.search(tail)), None)
    if attends or (named != "mixer" and any(not _replaces(n) for n in writes)):
        kind = "attention"
    else:
        kind = "mixer" if writes else "ffn"
    if named is not None and (named == "ffn") != (kind == "ffn"):
        does = "writes to a cache" if writes else "attends" if attends else "has no effect"
        raise UnsupportedError(
            f"{path}: its name says {named}, but it {does}, which says {kind}. "
            "It is refused because skipping the wrong kind corrupts the KV cache."
        )
    return kind


def _replaces(write: fx.Node) -> bool:
    """Return whether a write overwrites all of an input at once."""
    return operation(write) == "copy_" and write.args[0] is written(write)


def _refuse_parallel(
    residual: Residual,
    order: Mapping[fx.Node, int],
    ancestors: Mapping[fx.Node, int],
    layer: int,
) -> None:
    """Refuse two branches that are added to the stream in one expression.

    :class:`SerializeBranches` could not write them one after the other, or was not run.

    """
    branch = root_of(residual.branch)
    if not is_plain_add(branch):
        return
    terms = [t for t in branch.all_input_nodes if shape_of(t) == shape_of(residual.add)]
    paths = {branch_path(residual.add, t) for t in terms}
    reads = [t for t in terms if ancestors[t] >> order[residual.stream] & 1]
    if len(reads) == 2 and len(paths) == 2 and all(_layer(p) is not None for p in paths):
        kinds = {next((k for k, n in KIND_BY_NAME.items() if n.search(p)), p) for p in paths}
        if len(kinds) == 2:
            raise UnsupportedError(
                f"layer {layer} adds two branches ({', '.join(sorted(paths))}) to the residual "
                "stream in one expression, and they cannot be taken one after the other: both have "
                "effects, or the stream is overwritten and read again."
            )


def _refuse_other_stream(residual: Residual, path: str) -> None:
    """Refuse a sublayer that changes the stream's shape or dtype, which no surrogate could."""
    before, after = (n.meta["example_value"] for n in (residual.stream, residual.add))
    if shape_of(residual.stream) != shape_of(residual.add) or before.dtype != after.dtype:
        raise UnsupportedError(
            f"{path} takes a residual stream {list(map(str, before.shape))} of {before.dtype} and "
            f"gives {list(map(str, after.shape))} of {after.dtype}; a skipped sublayer could not"
        )
    if before.dim() != 3:
        raise UnsupportedError(
            f"{path} is added to a stream {list(map(str, before.shape))} of {before.dim()} "
            "dimensions, not to a residual stream [batch, tokens, hidden]"
        )


def _refuse_attention_outside(graph: fx.Graph, regions: list[list[fx.Node]]) -> None:
    inside = {node for region in regions for node in region}
    for node in graph.nodes:
        attends = node.op != "placeholder" and operation(node) in ATTENTION_OPERATIONS
        if attends and node not in inside:
            raise UnsupportedError(
                f"attention at {module_path(node) or node.name} lies outside every residual "
                "sublayer that was found, so the residual stream was not understood."
            )


def _refuse_duplicates(found: list[ResidualBranch]) -> None:
    seen: dict[str, ResidualBranch] = {}
    for sublayer in found:
        twin = seen.setdefault(sublayer.name, sublayer)
        if twin is not sublayer:
            raise UnsupportedError(
                f"layer {sublayer.layer} has two {sublayer.kind} sublayers "
                f"({twin.path}, {sublayer.path}); a plan could not name one of them."
            )
