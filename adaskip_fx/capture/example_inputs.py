"""Example inputs to capture a phase with, whose lengths are marked as dynamic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..kv_cache.layer_spec import LayerCacheSpec
from ..kv_cache.views import DynamicCacheView, LayerView, StaticCacheView
from ..utils.torch_internals import mark_dynamic
from .arguments import Forward, step_inputs
from .graph_key import GraphKey

# Example lengths while capturing. Odd primes, so that no length is a multiple of another by
# accident; about as long as real prompts, because compilers tune for them.
_TOKENS, _TOTAL = 509, 1021
# How many logits are kept, of few tokens as well: fewer than there are, wherever there are three.
_KEPT = (251, 127, 31, 7, 3, 2)


class Lengths(NamedTuple):
    """The numbers that a graph is captured with, though it holds for others.

    Attributes:
        tokens: new ones.
        total: those stored, the new ones included.
        kept: logits that are asked for; of no meaning to a graph of the last token's alone.
    """

    tokens: int
    total: int
    kept: int = 2


def example_lengths(key: GraphKey, max_length: int | None) -> Lengths:
    """Return how many new and stored tokens to capture with, and how many logits to keep.

    Args:
        key: of the graph.
        max_length: positions that the model has; None if there is no limit.
    """
    # less than the longest: at a boundary a length would be a constant
    longest = max(2, max_length - 3) if max_length else 4 * _TOTAL
    total = 1 if key.one_stored else min(_TOTAL, longest)
    if key.one_token:
        return Lengths(1, total)
    tokens = min(_TOKENS, total - 1)
    kept = next((n for n in _KEPT if n < tokens), _KEPT[-1])
    return Lengths(tokens, tokens if key.phase == "prefill" else total, kept)


def example_arguments(
    model: torch.nn.Module,
    forward: Forward,
    key: GraphKey,
    specs: Sequence[LayerCacheSpec],
    lengths: Lengths,
) -> dict[str, Any]:
    """Return the captured function's arguments, made of examples; as `capture_phase` takes them."""
    tokens, total, kept = lengths
    ids = torch.zeros(key.batch, tokens, dtype=torch.int64, device=key.device)
    inputs = step_inputs(
        forward,
        ids,
        torch.zeros_like(ids),
        torch.ones(key.batch, total, dtype=torch.bool, device=key.device) if key.masked else None,
        1 if key.last_logits else torch.zeros(kept, dtype=torch.int64, device=key.device),
    )
    for name in ("input_ids", "position_ids", "attention_mask", "logits_to_keep"):
        if isinstance(example := inputs.get(name), torch.Tensor):
            _mark_length(example, example.dim() - 1)
    return {
        "model": model,
        "forward": forward,
        "cache": _example_static_cache(key, specs, total)
        if key.static_cache
        else _example_cache(key, specs, tokens, total),
        "inputs": inputs,
    }


def _example_cache(
    key: GraphKey, specs: Sequence[LayerCacheSpec], tokens: int, total: int
) -> DynamicCacheView:
    def shaped(heads: int, dim: int) -> torch.Tensor:
        room = total + 3 if total > 1 else 1  # strides of a buffer that is not full
        size, stride = (key.batch, heads, total, dim), (heads * room * dim, room * dim, dim, 1)
        part = torch.empty_strided(size, stride, dtype=key.dtype, device=key.device)
        return _mark_length(part, 2)

    layers = [LayerView.shaped(s, key.batch, shaped, key.device) for s in specs]
    filled, new = (
        _mark_length(torch.empty(n, dtype=torch.int8, device="cpu"), 0) for n in (total, tokens)
    )
    return DynamicCacheView(layers, filled, new, prefill=key.phase == "prefill")


def _example_static_cache(
    key: GraphKey, specs: Sequence[LayerCacheSpec], capacity: int
) -> StaticCacheView:
    def shaped(heads: int, dim: int) -> torch.Tensor:
        size = (key.batch, heads, capacity, dim)
        return _mark_length(torch.empty(size, dtype=key.dtype, device=key.device), 2)

    layers = [LayerView.shaped(s, key.batch, shaped, key.device) for s in specs]
    return StaticCacheView(layers, torch.zeros(1, dtype=torch.int64, device=key.device))


def _mark_length(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    if tensor.shape[dim] > 1:
        mark_dynamic(tensor, dim)
    return tensor
