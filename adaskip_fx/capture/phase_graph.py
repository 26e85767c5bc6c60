"""One captured graph per phase and key, cut into pieces and ready to be linked.

Three phases, one capture each: ``prefill`` (an empty cache; without padding maskless and causal),
``extend`` (several tokens on a filled cache, masked) and ``decode`` (one token). Prompt and cache
lengths are symbolic, and so are rows from two on. Everything else that a graph depends on is in
its key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import fx
from transformers import PreTrainedModel

from adaskip_passes import (
    FuseProjections,
    FuseRankSums,
    Pass,
    PieceCompiler,
    UnsupportedError,
    canonicalize,
    capture,
    find_sublayers,
    outline,
)
from adaskip_passes.analysis.effects import accesses, is_mutation, operation
from adaskip_passes.decode.absorb_latent import AbsorbLatent
from adaskip_passes.decode.fuse_attention import FuseAttention
from adaskip_passes.decode.fuse_experts import FuseExperts
from adaskip_passes.decode.fuse_head_norms import FuseHeadNorms
from adaskip_passes.decode.fuse_rotary import FuseRotary
from adaskip_passes.decode.write_out_experts import WriteOutExperts
from adaskip_passes.decode.write_out_products import WriteOutProducts
from adaskip_passes.infra.pass_manager import run_passes
from adaskip_passes.partition.outer import piece_of, sublayer_calls
from adaskip_passes.tracing.capture import Binder, Capture, ShapeGuards
from adaskip_passes.tracing.reads import readable
from adaskip_passes.tracing.repeated_layers.mark import Repeat
from adaskip_passes.transforms.short_sums import WriteOutShortSums

from ..kv_cache.layer_spec import LayerCacheSpec
from ..plans.sublayer import Sublayer
from . import attention, config_reads, mixers, rotary
from .arguments import Forward
from .example_inputs import Lengths, example_arguments
from .graph_key import GraphKey
from .traced_functions import traced_function

#: A layer and what it keeps in the cache: ``attention`` (keys and values) or ``mixer`` (states).
Memory: TypeAlias = tuple[int, str]
#: Shape, strides, dtype and device of a tensor; of another value the name of its type.
Layout: TypeAlias = tuple[object, ...]
#: Operators that read of a buffer what a table of bounds says.
_BY_BOUNDS = ("attend.default", "attend", "attend_latent.default")
#: What a node of a captured graph takes of main memory, roughly: itself, and its share of what was
#: traced for it and compiled of it.
_NODE_BYTES = 8192
_STORED = re.compile(
    r"L\['cache'\]\.layers\[(\d+)\]\.(keys|values|(?:conv|recurrent)_states\[\d+\])"
)


@dataclass(frozen=True, eq=False)
class CapturedPhase:
    """One captured phase.

    Attributes:
        key: what it is for.
        rows: of the batch that it was captured with.
        capture: graph, sources, tracing context.
        outer: the outer graph with an empty plan.
        sublayers: in the order of the residual stream, as plans name them.
        modules: for each of them the paths of the modules that its branch comes out of.
        memory: for each of them what it uses of the cache: which layer's, keys and values
            (attention) or states (mixer).
        compiler: compiles the pieces of this capture.
        input_index: where each input's value is, by name, in ``(*weights, *step inputs)``.
        bind_weights: from the captured function's arguments to the inputs that stay the same during
            a request: parameters, buffers and whatever else is no argument of a step.
        bind_step: likewise to the inputs that change with every step.
        weight_layouts: shape, strides, dtype and device of each weight as it was captured; None for
            an input that is no tensor.
    """

    key: GraphKey
    rows: int
    capture: Capture
    outer: fx.GraphModule
    sublayers: tuple[Sublayer, ...]
    modules: tuple[tuple[str, ...], ...]
    memory: tuple[frozenset[Memory], ...]
    compiler: PieceCompiler
    input_index: Mapping[str, int]
    bind_weights: Binder
    bind_step: Binder
    weight_layouts: tuple[Layout | None, ...]

    def weights(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the inputs that stay the same during a request, as they are now.

        Args:
            arguments: of the captured function, by name (see `bind_arguments`).

        Raises:
            UnsupportedError: a parameter was replaced by one of another shape, dtype or device.
        """
        values = self.bind_weights(arguments)
        for name, value, layout in zip(self.input_index, values, self.weight_layouts, strict=False):
            if layout is not None and _layout(value) != layout:
                raise UnsupportedError(
                    f"{name} was {layout} when the model was captured and is "
                    f"{_layout(value)} now; compile the model again"
                )
        return values

    @cached_property
    def nbytes(self) -> int:
        """Bytes of main memory, counted by nodes: of the graph, of its pieces, and between them."""
        calls = self.outer.graph.find_nodes(op="call_module")
        pieces = {id(piece.module): piece.module for piece in map(piece_of, calls) if piece}
        graphs = (self.capture.graph, self.outer, *pieces.values())
        return _NODE_BYTES * sum(len(module.graph.nodes) for module in graphs)

    def parts(self) -> dict[int, int]:
        """Return its bytes by identity, for the budget."""
        return {id(self): self.nbytes}

    def guards(self) -> ShapeGuards:
        """Return what must hold of the shapes, by what has been compiled until now."""
        return self.capture.shape_guards()


def capture_phase(
    model: PreTrainedModel,
    forward: Forward,
    key: GraphKey,
    specs: Sequence[LayerCacheSpec],
    lengths: Lengths,
    backend: str,
) -> CapturedPhase:
    """Capture one phase of `model` and cut it into pieces; nothing is run or compiled.

    Args:
        model: its attention implementation is the one of :mod:`adaskip_fx.capture.attention`.
        forward: the function to trace, called as ``forward(model, input_ids=..., ...)``.
        key: the phase, and what else the graph may depend on.
        specs: what each layer stores.
        lengths: example numbers of tokens, logits and rows (see `example_lengths`).
        backend: inner torch.compile backend, by name.

    Raises:
        UnsupportedError: one graph cannot be made, or its sublayers cannot be proven.
    """
    if key.static_cache and attention.is_own(model):
        raise UnsupportedError(
            f"{type(model).__name__}'s attention implementation is one that was registered, and "
            "may look at how many keys there are; whole buffers have more than are filled"
        )
    rotary.place(model, key.device)
    with torch.no_grad():
        arguments = example_arguments(model, forward, key, specs, lengths)
        cache = arguments["cache"]
        layers = Repeat.of("model", model, {"L['cache'].layers": cache.layers}, (cache,))
        captured = capture(
            traced_function(forward),
            arguments,
            lambda made: made,
            layers,
            partial(_exchanged, model),
        )
        if captured.python_effects:
            changed = ", ".join(map(readable, captured.python_effects))
            raise UnsupportedError(
                f"{type(model).__name__}.forward changes {changed} while it runs; a captured graph "
                "cannot repeat that"
            )
        if key.static_cache and not key.whole:
            with captured.reopened():
                run_passes(captured.graph, (AbsorbLatent(),), copy=False)
            _refuse_whole_reads(captured)
        with captured.reopened():  # what the cutting finds out of shapes is guarded as well
            return _cut(captured, key, lengths.rows, backend)


@contextmanager
def _exchanged(model: PreTrainedModel) -> Iterator[None]:
    """Have Dynamo read what computes the same and is traced sooner, or for more lengths."""
    with mixers.exchanged(model), config_reads.traced_once():
        yield


def _refuse_whole_reads(captured: Capture) -> None:
    """Refuse a graph that reads whole buffers: there is memory behind what is filled alone."""
    placeholders = captured.graph.graph.find_nodes(op="placeholder")
    for node, source in zip(placeholders, captured.sources, strict=True):
        found = _STORED.fullmatch(source)
        if found is None or found[2] not in ("keys", "values"):
            continue
        for user in accesses(captured.graph.graph.nodes, node):
            if not is_mutation(user) and operation(user) not in (*_BY_BOUNDS, "size"):
                raise UnsupportedError(
                    f"layer {found[1]} reads all of a buffer of {found[2]} by {operation(user)}, "
                    "filled or not"
                )


def _cut(captured: Capture, key: GraphKey, rows: int, backend: str) -> CapturedPhase:
    """Find the sublayers of a captured graph, and cut it into pieces."""
    canonicalize(captured.graph)
    found = find_sublayers(captured.graph.graph)
    outer = outline(captured.graph, found)
    weights, step = _sorted_inputs(captured)
    examples = {n.name: n.meta.get("example_value") for n in outer.graph.nodes}
    tensors = (examples[name] for name in weights)
    return CapturedPhase(
        key,
        rows,
        captured,
        outer,
        sublayers=tuple(Sublayer(s.layer, _kind(s.kind)) for s in found),
        modules=tuple(s.modules for s in found),
        memory=_memory(captured, outer),
        compiler=_compiler(captured, key, backend),
        input_index={name: i for i, name in enumerate([*weights, *step])},
        bind_weights=captured.binder(list(weights.values())),
        bind_step=captured.binder(list(step.values())),
        weight_layouts=tuple(_layout(t) if isinstance(t, torch.Tensor) else None for t in tensors),
    )


def _memory(captured: Capture, outer: fx.GraphModule) -> tuple[frozenset[Memory], ...]:
    """Return what each sublayer uses of the cache, by where its inputs come from."""
    placeholders = captured.graph.graph.find_nodes(op="placeholder")
    source = {n.name: s for n, s in zip(placeholders, captured.sources, strict=True)}
    found = []
    for _, call in sorted(sublayer_calls(outer.graph).items()):
        inputs = (a for a in call.args if isinstance(a, fx.Node) and a.op == "placeholder")
        matches = (_STORED.fullmatch(source[a.name]) for a in inputs)
        uses = ((int(m[1]), m[2] in ("keys", "values")) for m in matches if m)
        found.append(frozenset((i, "attention" if attends else "mixer") for i, attends in uses))
    return tuple(found)


def _compiler(captured: Capture, key: GraphKey, backend: str) -> PieceCompiler:
    lowering = _lowering(key, backend)
    return PieceCompiler(
        captured, backend, lowering, short_kernels=bool(lowering) and key.static_cache
    )


def _lowering(key: GraphKey, backend: str) -> tuple[Pass, ...]:
    """Return inner passes for the pieces: fused operators for a GPU's steps of a few tokens.

    (On a CPU one token's experts are written out: there an operator is a call more.)
    """
    if backend == "inductor" and key.device.type == "cpu":
        return (WriteOutExperts(),) if key.one_token and not key.static_cache else ()
    if key.device.type != "cuda" or backend != "inductor":
        return ()
    if not key.static_cache:
        return FuseExperts(any_rows=True), WriteOutShortSums()
    attention = FuseAttention(), FuseRotary(), FuseHeadNorms()
    return FuseRankSums(), FuseProjections(), *attention, FuseExperts(), WriteOutProducts()


def _layout(value: object) -> Layout:
    if not isinstance(value, torch.Tensor):
        return (type(value).__name__,)
    return tuple(value.shape), tuple(value.stride()), value.dtype, value.device


def _sorted_inputs(captured: Capture) -> tuple[dict[str, str], dict[str, str]]:
    """Return sources by input name: of what stays the same during a request, and of the rest."""
    weights: dict[str, str] = {}
    step: dict[str, str] = {}
    placeholders = captured.graph.graph.find_nodes(op="placeholder")
    for node, source in zip(placeholders, captured.sources, strict=True):
        changes = source.startswith(("L['cache']", "L['inputs']"))
        (step if changes else weights)[node.name] = source
    return weights, step


def _kind(kind: str) -> Literal["attention", "ffn", "mixer"]:
    assert kind in ("attention", "ffn", "mixer")
    return kind  # type: ignore[return-value]
