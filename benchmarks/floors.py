"""How fast a step or a prompt can be at best, from what must be read and multiplied.

Decode floor: bytes of every parameter that a step reads (all but the input embedding table) and of
the K/V of the attention that runs, over the measured copy bandwidth (norm weights, a thirtieth of
a thousandth of all, are left out). Prefill floor: 2 x parameters of the kept sublayers x tokens,
causal attention, and the head for one token, in floating-point operations, over the measured matrix
rate. New tokens on a filled cache attend to what is stored as well. Padding is neither read nor
multiplied: each row of a batch has a length of its own. K/V heads with a window read and multiply
what they see. Of attention that only writes its K/V their two projections are read and multiplied.
The promise of a plan is the floor of the full model over the floor of what it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaskip_fx.plans.skip_plan import Action, Phase, SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window


def decode_bytes(model: Any, plan: SkipPlan, length: int, batch: int = 1) -> float:
    """Bytes that one decode step at `length` stored tokens reads."""
    return rows_bytes(model, plan, [length] * batch)


def rows_bytes(model: Any, plan: SkipPlan, lengths: Sequence[int]) -> float:
    """Bytes that one decode step reads whose rows have `lengths` stored tokens, padding apart."""
    weights = _weights(model, plan, "decode") + _head(model)
    seen = sum(n for length in lengths for n in _seen(model, plan, "decode", length))
    return float(model.dtype.itemsize * (weights + 2 * head_dim(model) * seen))


def _seen(model: Any, plan: SkipPlan, phase: Phase, length: int) -> list[int]:
    """How many of `length` tokens the last one sees, in each K/V head of attention that runs."""
    heads, found = int(model.config.num_key_value_heads), list[int]()
    for sublayer in _kept(plan, phase):
        if sublayer.kind == "attention":
            window = plan.windows.get(phase, sublayer)
            full = heads if window is None else len(window.full_heads)
            found += [length] * full
            if window is not None:
                found += [window.seen(length)] * (heads - full)
    return found


def kv_bytes(model: Any, plan: SkipPlan, tokens: int) -> float:
    """Bytes of the keys and values that are stored of `tokens` tokens.

    A K/V head that has a window, in both phases, stores what it sees.
    """
    stored, heads = 0, int(model.config.num_key_value_heads)
    for sublayer in _kept(plan, "decode"):
        if sublayer.kind == "attention":
            phases: tuple[Phase, ...] = ("prefill", "decode")
            runs = [p for p in phases if plan.action(p, sublayer) is Action.RUN]
            windows = [plan.windows.get(phase, sublayer) for phase in runs]
            stored += sum(_most_seen(windows, head, tokens) for head in range(heads))
    return float(model.dtype.itemsize * stored * 2 * head_dim(model))


def _most_seen(windows: Sequence[Window | None], head: int, tokens: int) -> int:
    """Return how many of `tokens` tokens a K/V head sees through the widest of its windows."""
    return max(tokens if w is None or head in w.full_heads else w.seen(tokens) for w in windows)


def prefill_flop(model: Any, plan: SkipPlan, tokens: int, batch: int = 1) -> float:
    """Floating-point operations of a prompt of `tokens` tokens, logits for the last one."""
    return rows_flop(model, plan, [tokens] * batch)


def rows_flop(model: Any, plan: SkipPlan, lengths: Sequence[int]) -> float:
    """Operations of a prompt whose rows have `lengths` tokens, padding apart."""
    return sum(turn_flop(model, plan, tokens) for tokens in lengths)


def turn_flop(model: Any, plan: SkipPlan, tokens: int, stored: int = 0) -> float:
    """Operations of `tokens` new tokens of one row on `stored` ones, logits for the last one."""
    weights = _weights(model, plan, "prefill")
    total, group = stored + tokens, model.config.num_attention_heads
    group /= model.config.num_key_value_heads
    # scores and weighted values: 2 operations each for a number, of half of the new tokens' pairs
    pairs = 0.0
    for seen in _seen(model, plan, "prefill", total):
        pairs += _pairs(total, seen) - _pairs(stored, min(seen, stored))
    multiplied = 4 * pairs * group * head_dim(model)
    return float(2 * weights * tokens + multiplied + 2 * _head(model))


def _pairs(tokens: int, seen: int) -> float:
    """How many pairs there are of a token and one that it sees, the last `seen` ones at most."""
    return seen * seen / 2 + (tokens - seen) * seen


def _kept(plan: SkipPlan, phase: Phase) -> list[Sublayer]:
    return [s for s in plan.sublayers if plan.action(phase, s) is Action.RUN]


def _weights(model: Any, plan: SkipPlan, phase: Phase) -> int:
    """How many weights a token is multiplied by, in the sublayers."""
    found = 0
    for sublayer in plan.sublayers:
        layer, action = model.model.layers[sublayer.layer], plan.action(phase, sublayer)
        modules = [layer.self_attn if sublayer.kind == "attention" else layer.mlp]
        if action is Action.KV_ONLY:
            modules = [layer.self_attn.k_proj, layer.self_attn.v_proj]
        if action is not Action.SKIP:
            found += sum(p.numel() for module in modules for p in module.parameters())
    return found


def _head(model: Any) -> int:
    return int(model.lm_head.weight.numel())


def head_dim(model: Any) -> int:
    """Numbers of a key, or a value, of one head."""
    config = model.config
    return int(config.head_dim or config.hidden_size // config.num_attention_heads)


def _kv_width(model: Any) -> int:
    """Numbers that attention stores for a token, keys and values."""
    return 2 * int(model.config.num_key_value_heads) * head_dim(model)
