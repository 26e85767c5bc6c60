"""What layers keep in a cache of transformers': their specs, and copies of their tensors."""

from __future__ import annotations

from typing import Any

import torch

from adaskip_passes import UnsupportedError

from ..kv_cache.layer_spec import LayerCacheSpec, State, StateKind
from ..utils.transformers_types import CausalLM

#: transformers' classes of a layer's memory that hold keys and values, states, both or nothing
#: (`DummyLayer` since 5.23)
_KNOWN_LAYERS = frozenset(
    {
        *("DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer"),
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    }
)
#: Keys and values [B, H, T, D], None where a layer has none, and states.
LayerMemory = tuple[torch.Tensor | None, torch.Tensor | None, tuple[torch.Tensor, ...]]


def new_cache(model: CausalLM) -> Any:
    """Return a cache of transformers' whose layers keep all keys and values.

    No token is forgotten outside of a window: the mask sees to windows.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

    whole = {
        "DynamicSlidingWindowLayer": DynamicLayer,
        "LinearAttentionAndSlidingWindowAttentionLayer": LinearAttentionAndFullAttentionLayer,
    }
    cache = DynamicCache(config=model.config.get_text_config())
    kinds = [whole.get(type(layer).__name__) for layer in cache.layers]
    cache.layers = [
        layer if kind is None else kind() for layer, kind in zip(cache.layers, kinds, strict=True)
    ]
    return cache


def layer_specs(model: CausalLM, cache: Any) -> tuple[LayerCacheSpec, ...]:
    """Return what each layer of a model keeps, as it filled `cache` with a prompt.

    Raises:
        UnsupportedError: a layer keeps something else than keys, values and mixers' states.
    """
    specs = [_spec(index, layer) for index, layer in enumerate(cache.layers)]
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    return (*specs, *[LayerCacheSpec()] * (layers - len(specs)))


def _spec(index: int, layer: Any) -> LayerCacheSpec:
    kind = type(layer).__name__
    if kind not in _KNOWN_LAYERS:
        raise UnsupportedError(
            f"layer {index} keeps its memory in a {kind}; supported are keys and values, and the "
            "states of mixers"
        )
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    states = (*_states("conv", layer), *_states("recurrent", layer))
    shapes = tuple(State(k, i, tuple(t.shape[1:]), t.dtype) for k, i, t in states)
    if keys is None or values is None:
        return LayerCacheSpec(states=shapes)
    if keys.dim() != 4:
        raise UnsupportedError(
            f"layer {index} keeps keys of shape {list(keys.shape)}, not [B, H, T, D]"
        )
    return LayerCacheSpec(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], shapes)


def _states(kind: StateKind, layer: Any) -> list[tuple[StateKind, int, torch.Tensor]]:
    tensors = getattr(layer, f"{kind}_states", {})
    return [(kind, index, t) for index, t in tensors.items() if t is not None]


def memory_of(layer: Any, spec: LayerCacheSpec) -> LayerMemory:
    """Return copies of what a layer holds."""
    states = (*_states("conv", layer), *_states("recurrent", layer))
    held = tuple(t.clone() for _, _, t in states)
    if not spec.attends:
        return None, None, held
    return layer.keys.clone(), layer.values.clone(), held
