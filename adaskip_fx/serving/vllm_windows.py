"""A window of a plan as vLLM's own sliding window, whose cache lets go of what is not seen.

Imports vLLM.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import Attention

from adaskip_fx.plans.actions import PlanError
from adaskip_fx.plans.windows import Window


def set_window(body: nn.Module, window: Window, vllm_config: Any, layer: int) -> None:
    """Have the attention of a layer see a window.

    Its attention module is built anew with the window, since the kernel and the kind of K/V cache
    are chosen when it is built. A model's own window stays where it is the narrower one.

    Args:
        body: The attention's module in a decoder layer.
        window: What it sees.
        vllm_config: The engine's configuration.
        layer: Which layer it is, for messages.

    Raises:
        PlanError: vLLM has no such window, or this attention cannot be built anew.
    """
    name, old = _attention(body, layer)
    if window.tokens + window.sinks >= vllm_config.model_config.max_model_len:
        return  # no request is long enough to notice
    _check_window(window, layer)
    tokens = min(window.tokens, old.sliding_window or window.tokens)
    if tokens == old.sliding_window:
        return
    context = vllm_config.compilation_config.static_forward_context
    order = list(context)
    del context[old.layer_name]
    new = Attention(
        old.num_heads,
        old.head_size,
        old.impl.scale,
        num_kv_heads=old.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=old.quant_config,
        logits_soft_cap=getattr(old.impl, "logits_soft_cap", None) or None,
        per_layer_sliding_window=tokens,
        prefix=old.layer_name,
        attn_type=old.attn_type,
    )
    registered = dict(context)
    context.clear()
    context.update({key: registered[key] for key in order})
    parent, _, last = name.rpartition(".")
    setattr(body.get_submodule(parent), last, new)


def _attention(body: nn.Module, layer: int) -> tuple[str, Any]:
    found = [(n, m) for n, m in body.named_modules() if isinstance(m, Attention)]
    why = ""
    if len(found) != 1:
        why = f"it has {len(found)} attention modules of vLLM's"
    elif _has_more(found[0][1]):
        why = "it has biases, sinks of its own, shared K/V or values of another width"
    if why:
        raise PlanError(
            f"{layer}.attention: no window can be served, {why}; use a plan without windows"
        )
    return found[0]


def _has_more(attention: Any) -> bool:
    """Return whether an attention module has what it could not be built anew with."""
    return (
        type(attention) is not Attention
        or getattr(attention.impl, "alibi_slopes", None) is not None
        or attention.has_sink
        or attention.kv_sharing_target_layer_name is not None
        or attention.head_size_v != attention.head_size
        or attention.use_alibi_sqrt
    )


def _check_window(window: Window, layer: int) -> None:
    if window.sinks:
        raise PlanError(
            f"{layer}.attention: {window} shows the first {window.sinks} tokens, and vLLM's "
            "sliding windows show the last ones alone; make a plan with "
            "`adaskip-fx windows --layers --sinks 0`"
        )
    if window.full_heads:
        raise PlanError(
            f"{layer}.attention: {window} is of some K/V heads, and vLLM's sliding windows are of "
            "whole layers; make a plan with `adaskip-fx windows --layers --sinks 0`"
        )
