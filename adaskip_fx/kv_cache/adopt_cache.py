"""A cache that a caller brings along: ours, or one of transformers' that becomes ours.

transformers' models fill the cache that is passed to them: its documentation's recipes make a
``DynamicCache()``, pass it, and go on using that object. If ours replaced it and the object stayed
as it was, a caller who goes on with it would silently get another text's answer. So the object
itself becomes the request's cache (`SkipCache.become`), with what it held: its length, its layers,
a copy of it and the next call on it are right, and another model refuses it by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from ..utils.transformers_internals import OFFSETS, keeps_offsets
from .cache import SkipCache

if TYPE_CHECKING:
    from ..runtime.runtime import Runtime
    from .layer_spec import LayerCacheSpec

_LEAVE_OUT = "Leave past_key_values out, and continue with the one that comes back"


def own_cache(cache: Any, runtime: Runtime) -> SkipCache:
    """Return the cache that a caller passed as one of this compiled model's: it, or what it became.

    Args:
        cache: what was passed.
        runtime: of the compiled model that is to use it.

    Raises:
        TypeError, ValueError: it cannot be used; the message says why, and it is as it was.
    """
    if isinstance(cache, SkipCache):
        if cache.owner is not runtime:
            raise ValueError(
                "past_key_values was made by another compiled model, whose plan stores other layers"
            )
        return cache
    refusal = _kind_refused(cache)
    if refusal:
        raise TypeError(f"past_key_values {refusal}. {_LEAVE_OUT}")
    held = _held(cache)
    ours = runtime.new_cache()
    if held is not None:
        if keeps_offsets(runtime.model):
            name = type(runtime.model).__name__
            raise ValueError(
                f"past_key_values is filled, but {name} keeps the positions that follow an image "
                f"on itself ({OFFSETS}), and not in it. {_LEAVE_OUT}"
            )
        _check(held, ours)
        _fill(ours, held)
    return ours.become(cache)


def _kind_refused(cache: Any) -> str:
    """Return why a cache of this kind cannot be used; empty if it can."""
    kind = type(cache).__name__
    if type(cache) is not DynamicCache:
        return f"is a {kind}; a compiled model needs its own cache, or a DynamicCache"
    if cache.offloading:
        return "is offloaded, but a compiled model's buffers stay on the model's device"
    for index, layer in enumerate(cache.layers):
        if type(layer) not in _KNOWN:
            return f"has a {type(layer).__name__} (layer {index}), which is not known here"
    return ""


#: Layers that hold keys, values and states, and nothing else.
_KNOWN = tuple(
    found
    for name in (
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "DummyLayer",
    )
    if (found := getattr(cache_utils, name, None)) is not None
)


@dataclass(frozen=True)
class _Held:
    """The content of a filled cache of transformers'.

    Attributes:
        batch, tokens: rows, and how many tokens of each.
        layers: transformers' own.
    """

    batch: int
    tokens: int
    layers: Sequence[Any]

    def tensors(self, layer: int, spec: LayerCacheSpec) -> list[torch.Tensor | None]:
        """Return keys and values [batch, heads, tokens, dim] of a layer, and the spec's states."""
        if layer >= len(self.layers):
            return [None] * (2 + len(spec.states))
        held = self.layers[layer]
        states = (_states(held, f"{state.kind}_states").get(state.index) for state in spec.states)
        return [_tensor(held, "keys"), _tensor(held, "values"), *states]


def _held(cache: Any) -> _Held | None:
    """Return what a `DynamicCache` holds; None if it is empty.

    Raises:
        ValueError: not all of it is there any more, or nothing tells how much it is.
    """
    keys = [k for layer in cache.layers if (k := _tensor(layer, "keys")) is not None]
    kinds = ("conv_states", "recurrent_states")
    states = [s for layer in cache.layers for kind in kinds for s in _states(layer, kind).values()]
    if not keys and not states:
        return None
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None:
            gone = layer.cumulative_length - layer.keys.shape[2]
            if gone:
                raise ValueError(
                    f"past_key_values has forgotten {gone} tokens of layer {index}, which are "
                    "outside of its sliding window, and a compiled model stores all of them: use "
                    f"a DynamicCache() made without config. {_LEAVE_OUT}"
                )
    lengths = sorted({k.shape[2] for k in keys})
    if len(lengths) != 1:
        found = f"{lengths} tokens, by layer" if lengths else "states alone"
        raise ValueError(
            f"past_key_values does not tell how many tokens it is: it holds {found}. {_LEAVE_OUT}"
        )
    return _Held(keys[0].shape[0], lengths[0], cache.layers)


def _tensor(layer: Any, name: str) -> torch.Tensor | None:
    found = getattr(layer, name, None)
    return found if isinstance(found, torch.Tensor) and found.numel() else None


def _states(layer: Any, name: str) -> dict[int, torch.Tensor]:
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return {}
    ready: dict[int, bool] = layer.has_previous_state
    states: dict[int, torch.Tensor | None] = getattr(layer, name)
    return {i: state for i, state in states.items() if state is not None and ready[i]}


def _check(held: _Held, ours: SkipCache) -> None:
    """Refuse a cache that cannot go on with the plan that a request would begin with."""
    if ours.request.undecided:
        raise ValueError(
            "past_key_values is filled, but this compiled model chooses a plan by the first "
            f"prompt. {_LEAVE_OUT}"
        )
    if ours.kept != ours.specs:
        skipped = next(i for i, kept in enumerate(ours.kept) if kept != ours.specs[i])
        raise ValueError(
            f"past_key_values is filled, but the plan stores nothing of layer {skipped}, whose "
            f"attention or mixer prompts skip. {_LEAVE_OUT}"
        )
    if len(held.layers) > len(ours.specs):
        raise ValueError(
            f"past_key_values has {len(held.layers)} layers, the model {len(ours.specs)}"
        )
    for index, spec in enumerate(ours.specs):
        wanted = _wanted(spec, held, ours)
        got = [_form(tensor) for tensor in held.tensors(index, spec)]
        if got != wanted:
            a, b = next((a, b) for a, b in zip(got, wanted, strict=True) if a != b)
            raise ValueError(
                f"past_key_values holds {a} in layer {index}, where the model stores {b}"
            )


def _wanted(spec: LayerCacheSpec, held: _Held, ours: SkipCache) -> list[str]:
    """Return the forms of a layer's tensors, in the order of `_Held.tensors`."""

    def form(dtype: torch.dtype, *shape: int) -> str:
        return _form(torch.empty(shape, dtype=dtype, device="meta"), ours.device)

    pairs = ((spec.key_heads, spec.key_dim), (spec.value_heads, spec.value_dim))
    return [
        *(form(ours.dtype, held.batch, h, held.tokens, d) if h else "nothing" for h, d in pairs),
        *(form(state.dtype, held.batch, *state.shape) for state in spec.states),
    ]


def _form(tensor: torch.Tensor | None, device: torch.device | None = None) -> str:
    if tensor is None:
        return "nothing"
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)} on {device or tensor.device}"


def _fill(ours: SkipCache, held: _Held) -> None:
    """Copy what is held into the buffers of `ours`, which is empty and stores the same."""
    buffers = ours.reserve(held.batch, held.tokens)
    for index, spec in enumerate(ours.specs):
        keys, values, *states = held.tensors(index, spec)
        pairs = [(buffers.keys[index], keys), (buffers.values[index], values)]
        for mine, theirs in pairs:
            if mine is not None and theirs is not None:
                mine.narrow(2, 0, held.tokens).copy_(theirs)
        for state, theirs in zip(buffers.states[index], states, strict=True):
            assert theirs is not None
            state.copy_(theirs)
    ours.advance(held.tokens)
