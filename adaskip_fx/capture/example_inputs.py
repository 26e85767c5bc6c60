"""Example inputs to capture a phase with, whose lengths and rows are marked as dynamic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..kv_cache.layer_spec import LayerCacheSpec
from ..kv_cache.packed_view import PackedCacheView
from ..kv_cache.views import DynamicCacheView, LayerView, StaticCacheView
from ..utils.torch_internals import mark_dynamic
from ..utils.transformers_types import CausalLM
from .arguments import AnyCacheView, Forward, step_inputs, tokens_of
from .graph_key import GraphKey

# Example lengths while capturing. Odd primes, so that no length is a multiple of another by
# accident; about as long as real prompts, because compilers tune for them.
_TOKENS, _TOTAL = 509, 1021
_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "attention_mask", "logits_to_keep")
_ROWS = 7  # of a packed prompt
# How many logits are kept, of few tokens as well: fewer than there are, wherever there are three.
_KEPT = (251, 127, 31, 7, 3, 2)


class Lengths(NamedTuple):
    """The numbers that a graph is captured with, though it holds for others.

    Attributes:
        tokens: new ones.
        total: those stored, the new ones included.
        kept: logits that are asked for; of no meaning to a graph of the last token's alone.
        rows: of the batch.
    """

    tokens: int
    total: int
    kept: int = 2
    rows: int = 1


def example_lengths(key: GraphKey, max_length: int | None) -> Lengths:
    """Return how many new and stored tokens to capture with, and how many logits to keep.

    Args:
        key: of the graph.
        max_length: positions that the model has; None if there is no limit.
    """
    # less than the longest: at a boundary a length would be a constant
    longest = max(2, max_length - 3) if max_length else 4 * _TOTAL
    total = 1 if key.one_stored else min(_TOTAL, longest)
    if key.one_token or key.static_tokens:
        return Lengths(max(1, key.static_tokens), total, rows=key.batch.example)
    tokens = min(_TOKENS, total - 1)
    kept = next((n for n in _KEPT if n < tokens), _KEPT[-1])
    alone = key.phase == "prefill" and not key.packed
    return Lengths(tokens, tokens if alone else total, kept, key.batch.example)


def example_arguments(
    model: CausalLM,
    forward: Forward,
    key: GraphKey,
    specs: Sequence[LayerCacheSpec],
    lengths: Lengths,
) -> dict[str, Any]:
    """Return the captured function's arguments, made of examples; as `capture_phase` takes them."""
    tokens, total, kept, rows = lengths
    positions = torch.zeros(rows, tokens, dtype=torch.int64, device=key.device)
    ids = positions.clone()
    if key.axes:
        positions = positions.expand(key.axes, -1, -1).contiguous()
    if key.embedded:
        width = model.get_input_embeddings().weight.shape[1]
        ids = torch.zeros(rows, tokens, width, dtype=key.dtype, device=key.device)
    keep: int | torch.Tensor = int(key.last_logits)
    if not key.last_logits and not key.static_tokens:
        keep = torch.zeros(kept, dtype=torch.int64, device=key.device)
    inputs = step_inputs(
        forward,
        ids,
        positions,
        torch.ones(rows, total, dtype=torch.bool, device=key.device) if key.masked else None,
        keep,
    )
    for name in _BY_TOKEN:
        example = inputs.get(name)
        if not isinstance(example, torch.Tensor):
            continue
        in_axes = name == "position_ids" and key.axes
        if name != "logits_to_keep":
            _mark_rows(example, key, 1 if in_axes else 0)
        if not key.static_tokens:
            _mark_length(example, 2 if in_axes else min(1, example.dim() - 1))
    return {
        "model": model,
        "forward": forward,
        "cache": _example_cache(key, specs, lengths),
        "inputs": inputs,
    }


def _example_cache(
    key: GraphKey, specs: Sequence[LayerCacheSpec], lengths: Lengths
) -> AnyCacheView:
    tokens, total, _, rows = lengths
    layers = _layers(key, specs, total, rows)
    if key.static_tokens:
        position, first = (
            _mark_rows(torch.zeros(rows, dtype=torch.int64, device=key.device), key)
            for _ in range(2)
        )
        return StaticCacheView(layers, position, first, key.whole)
    if key.packed:
        slots = torch.zeros(tokens, dtype=torch.int64, device=key.device)
        offsets = torch.zeros(_ROWS + 1, dtype=torch.int32, device="cpu")
        return PackedCacheView(layers, _mark_length(slots, 0), _mark_length(offsets, 0))
    filled, new = (
        _mark_length(torch.empty(n, dtype=torch.int8, device="cpu"), 0) for n in (total, tokens)
    )
    return DynamicCacheView(layers, filled, new, prefill=key.phase == "prefill")


def _layers(
    key: GraphKey, specs: Sequence[LayerCacheSpec], tokens: int, rows: int
) -> list[LayerView]:
    form = rows, tokens, key.dtype, key.device, key.by_head
    layers = [LayerView.example(spec, *form) for spec in specs]
    for layer in layers:
        for tensor in (layer.keys, layer.values):
            if tensor is not None:
                _mark_length(_mark_rows(tensor, key), 2)
        for states in (layer.conv_states, layer.recurrent_states):
            for state in states.values():
                _mark_rows(state, key)
    return layers


def _mark_rows(tensor: torch.Tensor, key: GraphKey, dim: int = 0) -> torch.Tensor:
    if key.batch.vary:
        mark_dynamic(tensor, dim, key.batch.bounds)
    return tensor


def _mark_length(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    if tensor.shape[dim] > 1:
        mark_dynamic(tensor, dim)
    return tensor


def lengths_of(arguments: Mapping[str, Any]) -> Lengths:
    """Return the lengths of a captured function's arguments, to capture another graph with."""
    cache, keep = arguments["cache"], arguments["inputs"].get("logits_to_keep")
    rows, tokens = tokens_of(arguments["inputs"]).shape[:2]
    if isinstance(cache, StaticCacheView):
        return Lengths(tokens, cache.capacity, rows=rows)
    if isinstance(cache, PackedCacheView):
        stored = next((v.keys.shape[2] for v in cache.layers if v.keys is not None), 2)
        return Lengths(cache.slots.shape[0], stored, keep.shape[0] if torch.is_tensor(keep) else 0)
    kept = {"kept": keep.shape[0]} if isinstance(keep, torch.Tensor) else {}
    return Lengths(cache.new.shape[0], cache.filled.shape[0], rows=rows, **kept)
