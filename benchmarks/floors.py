"""How fast a step or a prompt can be at best, from what must be read and multiplied.

Decode floor: bytes of every parameter that a step reads (all but the input embedding table) and of
the K/V of the attention that runs, over the measured copy bandwidth (norm weights, a thirtieth of
a thousandth of all, are left out). Prefill floor: 2 x parameters
of the kept sublayers x tokens, causal attention, and the head for one token, in floating-point
operations, over the measured matrix rate. The promise of a plan is the floor of the full model
over the floor of what it keeps.
"""

from __future__ import annotations

from typing import Any

from adaskip_fx.plans.skip_plan import Action, Phase, SkipPlan, Sublayer


def decode_bytes(model: Any, plan: SkipPlan, length: int, batch: int = 1) -> float:
    """Bytes that one decode step at `length` stored tokens reads."""
    item = model.dtype.itemsize
    weights = sum(_weights(model, s) for s in _kept(plan, "decode")) + _head(model)
    attention = sum(s.kind == "attention" for s in _kept(plan, "decode"))
    return float(item * (weights + attention * batch * length * _kv_width(model)))


def prefill_flop(model: Any, plan: SkipPlan, tokens: int, batch: int = 1) -> float:
    """Floating-point operations of a prompt of `tokens` tokens, logits for the last one."""
    weights = sum(_weights(model, s) for s in _kept(plan, "prefill"))
    attention = sum(s.kind == "attention" for s in _kept(plan, "prefill"))
    config = model.config
    width = config.num_attention_heads * _head_dim(model)
    causal = 2 * tokens * tokens * width  # half of the 4 T^2 of scores and weighted values
    return float(batch * (2 * weights * tokens + attention * causal + 2 * _head(model)))


def _kept(plan: SkipPlan, phase: Phase) -> list[Sublayer]:
    return [s for s in plan.sublayers if plan.action(phase, s) is Action.RUN]


def _weights(model: Any, sublayer: Sublayer) -> int:
    layer = model.model.layers[sublayer.layer]
    module = layer.self_attn if sublayer.kind == "attention" else layer.mlp
    return sum(p.numel() for p in module.parameters())


def _head(model: Any) -> int:
    return int(model.lm_head.weight.numel())


def _head_dim(model: Any) -> int:
    config = model.config
    return int(config.head_dim or config.hidden_size // config.num_attention_heads)


def _kv_width(model: Any) -> int:
    """Numbers that attention stores for a token, keys and values."""
    return 2 * int(model.config.num_key_value_heads) * _head_dim(model)
