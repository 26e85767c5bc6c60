"""One captured graph per phase and key, cut into pieces and ready to be linked.

Three phases, one capture each: ``prefill`` (an empty cache; without padding maskless and causal),
``extend`` (several tokens on a filled cache, masked) and ``decode`` (one token). Prompt and cache
lengths are symbolic. Everything else that a graph depends on is in its key.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from adaskip_passes import (
    FuseProjections,
    PieceCompiler,
    UnsupportedError,
    canonicalize,
    capture,
    find_sublayers,
    outline,
)
from adaskip_passes.infra.pass_base import Pass
from adaskip_passes.partition.outer import sublayer_calls
from adaskip_passes.tracing.capture import Binder, Capture, ShapeGuards
from adaskip_passes.tracing.reads import readable
from adaskip_passes.tracing.repeated_layers.mark import Repeat

from ..kv_cache.buffers import LayerCacheSpec
from ..kv_cache.names import cache_argument
from ..kv_cache.views import DynamicCacheView, LayerView, StaticCacheView
from ..plans.skip_plan import Sublayer
from . import attention

GraphPhase = Literal["prefill", "extend", "decode"]
Memory = tuple[int, str]
_STORED = re.compile(
    r"L\['cache'\]\.layers\[(\d+)\]\.(keys|values|(?:conv|recurrent)_states\[\d+\])"
)
Forward = Callable[..., Any]

# Example lengths while capturing. Odd primes, so that no length is a multiple of another by
# accident; about as long as real prompts, because compilers tune for them.
_TOKENS, _TOTAL = 509, 1021


@dataclass(frozen=True)
class GraphKey:
    """What a captured graph depends on besides lengths.

    Attributes:
        phase: which of the three graphs.
        batch: rows.
        one_token: a step of one token (a length of one is never symbolic).
        one_stored: that token is the first one.
        masked: a 2D attention mask is given.
        logits_to_keep: 0 for the logits of all tokens, else of the last n.
        dtype, device: of the model's floating point parameters.
        surroundings: what factories and autocast do where the model is called.
        static_cache: K/V are handed over as whole buffers and the position is on the device, so
            that every step works at the same addresses (decode only).
    """

    phase: GraphPhase
    batch: int
    one_token: bool
    one_stored: bool
    masked: bool
    logits_to_keep: int
    dtype: torch.dtype
    device: torch.device
    surroundings: Surroundings
    static_cache: bool = False


@dataclass(frozen=True)
class Surroundings:
    """State of torch that a model's code runs in, and a captured graph depends on.

    Attributes:
        autocast: the dtype of an active autocast region; None outside of one.
        dtype: of floating point tensors that are made without one.
        device: of tensors that are made without one.
    """

    autocast: torch.dtype | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> Surroundings:
        """As they are, of code that runs on a device."""
        on = torch.is_autocast_enabled(device.type)
        autocast = torch.get_autocast_dtype(device.type) if on else None
        return cls(autocast, torch.get_default_dtype(), torch.get_default_device())


@dataclass(frozen=True, eq=False)
class CapturedPhase:
    """One captured phase.

    Attributes:
        key: what it is for.
        capture: graph, sources, tracing context.
        outer: the outer graph with an empty plan.
        sublayers: in stream order, as plans name them.
        modules: for each of them the paths of the modules that its branch comes out of.
        memory: for each of them what it uses of the cache: which layer's, keys and values
            (attention) or states (mixer).
        compiler: compiles the pieces of this capture.
        place: where each input's value is, by name, in ``(*fixed, *step)``.
        bind_fixed: from the captured function's arguments to the inputs that stay the same during
            a request (weights).
        step: likewise to the inputs that change with every step.
        expected: shape, strides, dtype and device of the fixed inputs as they were captured.
    """

    key: GraphKey
    capture: Capture
    outer: fx.GraphModule
    sublayers: tuple[Sublayer, ...]
    modules: tuple[tuple[str, ...], ...]
    memory: tuple[frozenset[Memory], ...]
    compiler: PieceCompiler
    place: Mapping[str, int]
    bind_weights: Binder
    step: Binder
    expected: tuple[tuple[Any, ...] | None, ...]

    def fixed(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """The inputs that stay the same during a request, looked up anew and checked.

        Raises:
            UnsupportedError: a parameter was replaced by one of another shape, dtype or device.
        """
        values = self.bind_weights(arguments)
        for name, value, expected in zip(self.place, values, self.expected, strict=False):
            if expected is not None and _layout(value) != expected:
                raise UnsupportedError(
                    f"{name} was {expected} when the model was captured and is "
                    f"{_layout(value)} now; compile the model again"
                )
        return values

    def guards(self) -> ShapeGuards:
        """What must hold of the shapes, by what has been compiled until now."""
        return self.capture.shape_guards()


def capture_phase(
    model: torch.nn.Module,
    forward: Forward,
    key: GraphKey,
    slots: Sequence[LayerCacheSpec],
    lengths: tuple[int, int],
    backend: str,
) -> CapturedPhase:
    """Capture one phase of `model` and cut it into pieces; nothing is run or compiled.

    Args:
        model: its attention implementation is the one of :mod:`adaskip_fx.capture.attention`.
        forward: the function to trace, called as ``forward(model, input_ids=..., ...)``.
        key: the phase and what else is fixed.
        slots: shapes of what each layer stores.
        lengths: example numbers of new and of stored tokens (see `example_lengths`).
        backend: inner torch.compile backend, by name.

    Raises:
        UnsupportedError: one graph cannot be made, or its sublayers cannot be proven.
    """

    def build(captured: Capture) -> CapturedPhase:
        if captured.python_effects:
            changed = ", ".join(map(readable, captured.python_effects))
            raise UnsupportedError(
                f"{type(model).__name__}.forward changes {changed} while it runs; a captured graph "
                "cannot repeat that"
            )
        canonicalize(captured.graph)
        found = find_sublayers(captured.graph.graph)
        names = tuple(Sublayer(s.layer, _kind(s.kind)) for s in found)
        outer = outline(captured.graph, found)
        fixed, step = _sorted_inputs(captured)
        examples = {n.name: n.meta.get("example_value") for n in outer.graph.nodes}
        tensors = (examples[name] for name in fixed)
        return CapturedPhase(
            key,
            captured,
            outer,
            names,
            tuple(s.modules for s in found),
            _memory(captured, outer),
            PieceCompiler(captured, backend, _lowering(key, backend)),
            place={name: i for i, name in enumerate([*fixed, *step])},
            bind_weights=captured.binder(list(fixed.values())),
            step=captured.binder(list(step.values())),
            expected=tuple(_layout(t) if isinstance(t, torch.Tensor) else None for t in tensors),
        )

    if key.static_cache and attention.is_own(model):
        raise UnsupportedError(
            f"{type(model).__name__}'s attention implementation is one that was registered, and "
            "may look at how many keys there are; whole buffers have more than are filled"
        )
    with torch.no_grad():
        arguments = _example_arguments(model, forward, key, slots, lengths)
        cache = arguments["cache"]
        layers = Repeat.of("model", model, {"L['cache'].layers": cache.layers}, (cache,))
        return capture(_TRACED[cache_argument(forward)], arguments, build, layers)


def _memory(captured: Capture, outer: fx.GraphModule) -> tuple[frozenset[Memory], ...]:
    """What each sublayer uses of the cache, by where its inputs come from."""
    placeholders = captured.graph.graph.find_nodes(op="placeholder")
    source = {n.name: s for n, s in zip(placeholders, captured.sources, strict=True)}
    found = []
    for _, call in sorted(sublayer_calls(outer.graph).items()):
        inputs = (a for a in call.args if isinstance(a, fx.Node) and a.op == "placeholder")
        matches = (_STORED.fullmatch(source[a.name]) for a in inputs)
        uses = ((int(m[1]), m[2] in ("keys", "values")) for m in matches if m)
        found.append(frozenset((i, "attention" if attends else "mixer") for i, attends in uses))
    return tuple(found)


def _lowering(key: GraphKey, backend: str) -> tuple[Pass, ...]:
    """Inner passes for the pieces: operators of its own where a GPU's decode step pays for them."""
    fused = key.static_cache and key.device.type == "cuda" and backend == "inductor"
    return (FuseProjections(),) if fused else ()


def _layout(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, torch.Tensor):
        return (type(value).__name__,)
    return tuple(value.shape), tuple(value.stride()), value.dtype, value.device


def _sorted_inputs(captured: Capture) -> tuple[dict[str, str], dict[str, str]]:
    """Sources by input name: of what is fixed during a request, and of what is not."""
    fixed: dict[str, str] = {}
    step: dict[str, str] = {}
    placeholders = captured.graph.graph.find_nodes(op="placeholder")
    for node, source in zip(placeholders, captured.sources, strict=True):
        changes = source.startswith(("L['cache']", "L['inputs']"))
        (step if changes else fixed)[node.name] = source
    return fixed, step


def _logits_of_cache(model: Any, forward: Any, cache: Any, inputs: Any) -> Any:
    """The traced function since transformers 5.24: logits [B, kept tokens, vocabulary]."""
    cache.begin(inputs["input_ids"].shape[1])
    return forward(model, cache=cache, use_cache=True, **inputs).logits


def _logits_of_states(model: Any, forward: Any, cache: Any, inputs: Any) -> Any:
    """Likewise, of a model with only mixers, before."""
    cache.begin(inputs["input_ids"].shape[1])
    return forward(model, cache_params=cache, use_cache=True, **inputs).logits


def _logits(model: Any, forward: Any, cache: Any, inputs: Any) -> Any:
    """Likewise, of all others."""
    cache.begin(inputs["input_ids"].shape[1])
    return forward(model, past_key_values=cache, use_cache=True, **inputs).logits


_TRACED = {
    "cache": _logits_of_cache,
    "cache_params": _logits_of_states,
    "past_key_values": _logits,
}
_logits_of_cache.__name__ = _logits_of_states.__name__ = _logits.__name__  # for messages


def _kind(kind: str) -> Literal["attention", "ffn", "mixer"]:
    assert kind in ("attention", "ffn", "mixer")
    return kind  # type: ignore[return-value]


def _example_arguments(
    model: torch.nn.Module,
    forward: Forward,
    key: GraphKey,
    slots: Sequence[LayerCacheSpec],
    lengths: tuple[int, int],
) -> dict[str, Any]:
    tokens, total = lengths
    ids = torch.zeros(key.batch, tokens, dtype=torch.int64, device=key.device)
    inputs = step_inputs(
        forward,
        ids,
        torch.zeros_like(ids),
        torch.ones(key.batch, total, dtype=torch.bool, device=key.device) if key.masked else None,
        key.logits_to_keep,
    )
    for name in ("input_ids", "position_ids", "attention_mask"):
        if name in inputs:
            _mark_length(inputs[name], 1)
    return {
        "model": model,
        "forward": forward,
        "cache": _example_static_cache(key, slots, total)
        if key.static_cache
        else _example_cache(key, slots, tokens, total),
        "inputs": inputs,
    }


def step_inputs(
    forward: Forward,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    logits_to_keep: int,
) -> dict[str, Any]:
    """The arguments of the model's forward, of those that it has."""
    has = _parameters(forward)
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if "position_ids" in has:
        inputs["position_ids"] = position_ids
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if "logits_to_keep" in has:
        inputs["logits_to_keep"] = logits_to_keep
    if "return_dict" in has:  # whatever the config says
        inputs["return_dict"] = True
    return inputs


@functools.cache
def _parameters(forward: Forward) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def example_lengths(key: GraphKey, max_length: int | None) -> tuple[int, int]:
    """New and stored tokens to capture with, for a model of at most `max_length` positions."""
    # less than the longest: at a boundary a length would be a constant
    longest = max(2, max_length - 3) if max_length else 4 * _TOTAL
    total = 1 if key.one_stored else min(_TOTAL, longest)
    if key.one_token:
        return 1, total
    tokens = min(_TOKENS, total - 1)
    return tokens, tokens if key.phase == "prefill" else total


def _example_cache(
    key: GraphKey, slots: Sequence[LayerCacheSpec], tokens: int, total: int
) -> DynamicCacheView:
    def shaped(heads: int, dim: int) -> torch.Tensor:
        room = total + 3 if total > 1 else 1  # strides of a buffer that is not full
        size, stride = (key.batch, heads, total, dim), (heads * room * dim, room * dim, dim, 1)
        part = torch.empty_strided(size, stride, dtype=key.dtype, device=key.device)
        return _mark_length(part, 2)

    layers = [LayerView.shaped(s, key.batch, shaped, key.device) for s in slots]
    filled, new = (
        _mark_length(torch.empty(n, dtype=torch.int8, device="cpu"), 0) for n in (total, tokens)
    )
    return DynamicCacheView(layers, filled, new, fresh=key.phase == "prefill")


def _example_static_cache(
    key: GraphKey, slots: Sequence[LayerCacheSpec], capacity: int
) -> StaticCacheView:
    def shaped(heads: int, dim: int) -> torch.Tensor:
        size = (key.batch, heads, capacity, dim)
        return _mark_length(torch.empty(size, dtype=key.dtype, device=key.device), 2)

    layers = [LayerView.shaped(s, key.batch, shaped, key.device) for s in slots]
    return StaticCacheView(layers, torch.zeros(1, dtype=torch.int64, device=key.device))


def _mark_length(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    if tensor.shape[dim] > 1:
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensor


def bind_arguments(
    model: torch.nn.Module,
    forward: Forward,
    cache: DynamicCacheView | StaticCacheView,
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """The captured function's arguments by name, as bindings and guards look them up."""
    return {"model": model, "forward": forward, "cache": cache, "inputs": inputs}
