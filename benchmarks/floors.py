"""How fast a step or a prompt can be at best, from what must be read and multiplied.

Decode floor: bytes of every parameter that a step reads (all but the input embedding table) and of
the K/V of the attention that runs, over the measured copy bandwidth (norm weights, a thirtieth of
a thousandth of all, are left out). Prefill floor: 2 x parameters of the kept sublayers x tokens,
causal attention, and the head for one token, in floating-point operations, over the measured matrix
rate. New tokens on a filled cache attend to what is stored as well. Padding is neither read nor
multiplied: each row of a batch has a length of its own. The promise of a plan is the floor of the
full model over the floor of what it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaskip_fx.plans.skip_plan import Action, Phase, SkipPlan, Sublayer


def decode_bytes(model: Any, plan: SkipPlan, length: int, batch: int = 1) -> float:
    """Bytes that one decode step at `length` stored tokens reads."""
    return rows_bytes(model, plan, [length] * batch)


def rows_bytes(model: Any, plan: SkipPlan, lengths: Sequence[int]) -> float:
    """Bytes that one decode step reads whose rows have `lengths` stored tokens, padding apart."""
    weights = sum(_weights(model, s) for s in _kept(plan, "decode")) + _head(model)
    return float(model.dtype.itemsize * weights) + kv_bytes(model, plan, sum(lengths))


def kv_bytes(model: Any, plan: SkipPlan, tokens: int) -> float:
    """Bytes of the keys and values that decode steps read of `tokens` tokens."""
    attention = sum(s.kind == "attention" for s in _kept(plan, "decode"))
    return float(model.dtype.itemsize * attention * tokens * _kv_width(model))


def prefill_flop(model: Any, plan: SkipPlan, tokens: int, batch: int = 1) -> float:
    """Floating-point operations of a prompt of `tokens` tokens, logits for the last one."""
    return rows_flop(model, plan, [tokens] * batch)


def rows_flop(model: Any, plan: SkipPlan, lengths: Sequence[int]) -> float:
    """Operations of a prompt whose rows have `lengths` tokens, padding apart."""
    return sum(turn_flop(model, plan, tokens) for tokens in lengths)


def turn_flop(model: Any, plan: SkipPlan, tokens: int, stored: int = 0) -> float:
    """Operations of `tokens` new tokens of one row on `stored` ones, logits for the last one."""
    weights = sum(_weights(model, s) for s in _kept(plan, "prefill"))
    attention = sum(s.kind == "attention" for s in _kept(plan, "prefill"))
    width = model.config.num_attention_heads * _head_dim(model)
    # scores and weighted values: 2 operations each for a number, of half of the new tokens' pairs
    pairs = 4 * tokens * stored + 2 * tokens * tokens
    return float(2 * weights * tokens + attention * pairs * width + 2 * _head(model))


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
