"""Mixtures of experts of several families: a step and a prompt over their floors, and beside eager.

A step must read what its tokens chose: how many distinct experts those are in each layer is counted
in the eager model, at the last of a few random tokens of each row.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from adaskip_fx.api import build
from adaskip_fx.capture.rounding import OtherRounding

from .. import models
from ..ceilings import seconds
from .bench import Bench
from .rows import Row, over

ROWS = 8  # of a batch


@dataclass(frozen=True)
class Shape:
    """A family's shape.

    Attributes:
        sizes: Of its config on a GPU; as many layers as leave room on one card.
        step: How many times its floor a step may take.
        tiny: What a config for a CPU says besides.
    """

    sizes: Mapping[str, Any]
    step: float
    tiny: Mapping[str, Any]


_TINY = {
    **{"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 16, "vocab_size": 256, "max_position_embeddings": 4096},
    "num_experts_per_tok": 2,
}
_LATENT = {
    "head_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
}
_GROUPED = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}

SHAPES: Mapping[str, Shape] = {
    "mixtral": Shape(
        {"num_hidden_layers": 16, "sliding_window": None}, 1.25, {"num_local_experts": 4}
    ),
    "qwen3_moe": Shape(
        {
            **{"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32},
            **{"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128},
            **{"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
        },
        1.6,
        {"num_experts": 8},
    ),
    "gpt_oss": Shape(
        {"num_hidden_layers": 24, "num_local_experts": 32},
        1.6,
        {
            **{"num_local_experts": 4, "sliding_window": 32},
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "deepseek_v3": Shape(
        {"num_hidden_layers": 6, "n_routed_experts": 64, "first_k_dense_replace": 1},
        1.6,
        {**_LATENT, **_GROUPED, "v_head_dim": 16, "n_routed_experts": 8, "num_key_value_heads": 4},
    ),
}


def family(main: Bench, name: str) -> Iterator[Row]:
    """A family's step of one row and of several, and its prompt; see `SHAPES`."""
    shape = SHAPES[name]
    model = made(main.device, name, shape)
    backend = "inductor" if main.device.type == "cuda" else "eager"
    bench = Bench((model, build(model, None, backend=backend)))
    context = bench.sizes.short
    right = dict(zip(("eager_error", "allowed_error"), errors(bench), strict=True))
    for rows, target in ((1, shape.step), (ROWS, 1.4)):
        cache = bench.filled(models.tokens(rows, context))
        took = bench.step_seconds(cache)
        del cache
        bench.begin()
        floor = _step_bytes(model, context, rows) / bench.copy_rate()
        what = f"{name}: step of {rows} at {context}: floor"
        yield over(what, took, floor, target, **right)
        if rows == 1:
            theirs = min(_eager_step(bench, context, way) for way in ("grouped_mm", "batched_mm"))
            yield over(f"{name}: step of 1 at {context}: eager", took, theirs, 1.0)
    ids = models.tokens(1, context)
    eager = functools.partial(model, input_ids=ids, logits_to_keep=1)
    runs: dict[str, Callable[[], Any]] = {"ours": functools.partial(bench.filled, ids)}
    prompts, rate = bench.times({**runs, "eager": eager}, settle=24)
    floor = _prompt_flop(model, context) / rate
    what = f"{name}: prompt of {context}"
    yield over(f"{what}: floor", prompts["ours"], floor, 1.3, **right)
    yield over(f"{what}: eager", prompts["ours"], prompts["eager"], 1.0)
    bench.begin()


def made(device: torch.device, name: str, shape: Shape) -> Any:
    """Return a random model of a family's shape; a tiny one on a CPU."""
    vocabulary = {"vocab_size": 32000, "max_position_embeddings": 131072}
    sizes = {**vocabulary, **shape.sizes} if device.type == "cuda" else {**_TINY, **shape.tiny}
    named = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"))
    config = AutoConfig.for_model(name, **{**sizes, **named})
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def errors(bench: Bench) -> tuple[float, float]:
    """Return the relative error of a prompt's and of steps' logits, and what it may be.

    Each is the larger median of tokens: a router's choice between two experts that are equally good
    may flip for some. Thrice what the eager model's logits move by is allowed, when its products
    are rounded the other way; see :mod:`adaskip_fx.capture.rounding`.
    """
    half = bench.sizes.compared // 2
    ids = models.tokens(1, 2 * half)
    cache = bench.fast.adaskip.new_cache()
    parts = (ids[:, :half], *ids[:, half:].split(1, 1))
    logits = [bench.fast(input_ids=part, past_key_values=cache).logits for part in parts]
    expected = bench.model(input_ids=ids, use_cache=False).logits
    with OtherRounding(0):
        moved = bench.model(input_ids=ids, use_cache=False).logits

    def error(other: torch.Tensor) -> float:
        difference = (other.double() - expected.double()).norm(dim=-1)[0]
        parts = (difference / expected.double().norm(dim=-1)[0]).split(half)
        return max(float(part.median()) for part in parts)

    return error(torch.cat(logits, 1)), max(bench.tolerance, 3 * error(moved))


def _eager_step(bench: Bench, context: int, experts: str) -> float:
    """Return the seconds of a step of the eager model, with one of its ways to run experts."""
    model, before = bench.model, bench.model.get_experts_implementation()
    cache, token = DynamicCache(config=model.config), models.tokens(1, 1)
    model(input_ids=models.tokens(1, context), past_key_values=cache, logits_to_keep=1)
    model.set_experts_implementation(experts)
    try:
        step = functools.partial(model, input_ids=token, past_key_values=cache)
        return statistics.median(seconds(step, bench.device, 10, 3))
    finally:
        model.set_experts_implementation(before)


# Floors ------------------------------------------------------------------------------------------


def _experts(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "down_proj") and hasattr(m, "gate_up_proj")]


def _chosen(model: Any, rows: int) -> list[int]:
    """Return how many distinct experts a step of so many rows chooses, in each layer."""
    counts, handles = list[int](), list[Any]()
    ids = models.tokens(rows, 16)

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = [*args, *kwargs.values()]
        chosen = next(t for t in named if isinstance(t, torch.Tensor) and t.dtype == torch.int64)
        counts.append(int(chosen.view(*ids.shape, -1)[:, -1].unique().numel()))

    for module in _experts(model):
        handles.append(module.register_forward_pre_hook(count, with_kwargs=True))
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return counts


def _others(model: Any) -> int:
    """Return the numbers of all that is neither an expert of a router's nor an embedding."""
    routed = sum(p.numel() for m in _experts(model) for p in m.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    return sum(p.numel() for p in model.parameters()) - routed - embedding


def _each(module: Any) -> float:
    """Return the numbers of one expert."""
    return sum(p.numel() for p in module.parameters()) / module.down_proj.shape[0]


def _step_bytes(model: Any, context: int, rows: int) -> float:
    """Return the bytes that a step of so many rows reads, all of which have `context` tokens."""
    stored = rows * sum(min(seen, context) for seen in _windows(model)) * _stored(model)
    return weight_bytes(model, rows) + stored * float(model.dtype.itemsize)


def weight_bytes(model: Any, rows: int) -> float:
    """Return the bytes of the weights that a step of so many rows reads."""
    numbers = float(_others(model))
    for module, count in zip(_experts(model), _chosen(model, rows), strict=True):
        numbers += count * _each(module)
    return numbers * float(model.dtype.itemsize)


def _prompt_flop(model: Any, tokens: int) -> float:
    """Return the operations of a prompt, logits for the last token."""
    config = model.config
    group = config.num_attention_heads / _heads(model)
    pairs = sum(s * s / 2 + (tokens - s) * s for s in (min(w, tokens) for w in _windows(model)))
    return float(product_flop(model, tokens) + 2 * pairs * group * sum(_widths(model)))


def product_flop(model: Any, tokens: int) -> float:
    """Return the operations of a prompt's products with weights, logits for the last token."""
    head = model.lm_head.weight.numel()
    active = _others(model) - head
    active += sum(model.config.num_experts_per_tok * _each(m) for m in _experts(model))
    return float(2 * active * tokens + 2 * head)


def _windows(model: Any) -> list[int]:
    """Return how many tokens the last one sees, in each layer."""
    config, every = model.config, 2**31
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else every for kind in kinds]


def _heads(model: Any) -> int:
    latent = getattr(model.config, "kv_lora_rank", None)
    return int(model.config.num_attention_heads if latent else model.config.num_key_value_heads)


def _stored(model: Any) -> int:
    """Return the numbers of a token that a layer keeps: latents, or keys and values."""
    config = model.config
    if latent := getattr(config, "kv_lora_rank", None):
        return int(latent + config.qk_rope_head_dim)
    return sum(_widths(model))


def _widths(model: Any) -> tuple[int, int]:
    """Return the numbers of a token's keys and of its values, in a layer, heads expanded."""
    config, heads = model.config, _heads(model)
    if getattr(config, "kv_lora_rank", None):
        keys = config.qk_nope_head_dim + config.qk_rope_head_dim
        return heads * keys, heads * config.v_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads * width, heads * width
