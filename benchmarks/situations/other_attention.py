"""Attention that is not Llama's: soft caps, sinks, sliding windows, latents; steps and prompts.

Models have the shapes of known ones with a smaller vocabulary and random weights. Of GPT-OSS all
experts are chosen, and DeepSeek-V3 has dense layers alone, so that a step reads every weight. On a
latent cache the floor is of the latents, not of keys and values that are made of them.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan

from .. import models
from ..ceilings import seconds
from .bench import ON_GPU, TINY, Bench
from .rows import Row, over

_QUICK = 50e-6  # seconds: where a layer's bytes take less, launches count, and more is allowed


@dataclass(frozen=True)
class Shape:
    """A model's sizes, on a GPU and elsewhere."""

    kind: str
    large: Mapping[str, Any]
    tiny: Mapping[str, Any]

    def config(self, on_gpu: bool) -> Any:
        """Return the configuration for a device."""
        common = {"pad_token_id": None, "eos_token_id": None, "bos_token_id": None}
        sizes = _LARGE | dict(self.large) if on_gpu else _TINY | dict(self.tiny)
        return AutoConfig.for_model(self.kind, **common, **sizes)


_LARGE = {"vocab_size": 32000, "max_position_embeddings": 32768, "tie_word_embeddings": False}
_TINY = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096},
    "tie_word_embeddings": False,
}
_SLIDING = {"head_dim": 16, "sliding_window": 32}

SHAPES: Mapping[str, Shape] = {
    "Gemma 2 9B": Shape(
        "gemma2",
        {
            **{"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42},
            **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
        },
        _SLIDING,
    ),
    "Gemma 3 12B": Shape(
        "gemma3_text",
        {
            **{"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48},
            **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
            "sliding_window": 1024,
        },
        _SLIDING,
    ),
    "GPT-OSS, 4 experts": Shape(
        "gpt_oss",
        {
            **{"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24},
            **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64},
            **{"num_local_experts": 4, "num_experts_per_tok": 4},
        },
        {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 4},
    ),
    "DeepSeek-V3, dense": Shape(
        "deepseek_v3",
        {"num_hidden_layers": 6, "first_k_dense_replace": 6},
        {
            **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8},
            **{"qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4},
            "first_k_dense_replace": 2,
        },
    ),
}


class _Other(Bench):
    """One of `SHAPES`, eager and compiled."""

    def __init__(self, shape: Shape) -> None:
        self.device = models.device()
        on_gpu = self.device.type == "cuda"
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(
                shape.config(on_gpu), dtype=torch.bfloat16 if on_gpu else torch.float32
            )
        self.model = model.eval().requires_grad_(False)
        self.fast = build(self.model, None, backend="inductor" if on_gpu else "eager")
        self.plan = SkipPlan.empty(self.fast.adaskip.sublayers)
        self.sizes = ON_GPU if on_gpu else TINY

    def floor_bytes(self, cache: Any) -> float:
        """Return what a step reads on a filled cache: weights, and what attention sees."""
        decoder = self.model.model
        weights = [*decoder.layers.parameters(), *self.model.lm_head.parameters()]
        size, seen = self.model.dtype.itemsize, 0
        for layer, spec in enumerate(cache.specs):
            seen += spec.nbytes(1, _seen(self.model.config, layer, cache.length), size)
        return float(sum(p.numel() for p in weights) * size + seen)


def _seen(config: Any, layer: int, length: int) -> int:
    """Return how many of `length` tokens a layer's attention sees."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is not None and kinds[layer] == "sliding_attention"
    return min(length, config.sliding_window) if sliding else length


def other_attention(bench: Bench) -> Iterator[Row]:
    """Of each model a step over its floor, and a prompt over transformers' own."""
    for name, shape in SHAPES.items():
        one = _Other(shape)
        yield from _rows(one, name)
        one.begin()
        del one
        gc.collect()
        bench.begin()


def _rows(one: _Other, name: str) -> Iterator[Row]:
    context = one.sizes.short
    error = one.eager_error((one.sizes.compared, 1))
    ids = models.tokens(1, context)
    prompts = {
        "fast": lambda: one.filled(ids),
        "eager": lambda: one.model(input_ids=ids, use_cache=True, logits_to_keep=1),
    }
    took, _ = one.times(prompts, warmup=1, settle=2)
    what = f"{name}: prompt of {context}: transformers"
    yield over(what, took["fast"], took["eager"], 1.0, eager_error=error)
    one.begin()
    cache = one.filled(ids)
    step = one.step_seconds(cache)
    floor = one.floor_bytes(cache) / one.copy_rate()
    del cache
    a_layer = floor / one.model.config.num_hidden_layers
    notes = {
        "transformers_ms": 1000 * _eager_step(one, ids),
        "floor_us_a_layer": 1e6 * a_layer,
        "us_a_layer": 1e6 * step / one.model.config.num_hidden_layers,
        "why_no_static_cache": runtime_of(one.fast).why_no_static_cache,
    }
    target = 1.6 if a_layer < _QUICK else 1.25
    what = f"{name}: step at {context}: floor"
    yield over(what, step, floor, target, eager_error=error, notes=notes)


def _eager_step(one: _Other, ids: torch.Tensor) -> float:
    """Return seconds of a step of transformers' own, on its dynamic cache."""
    cache = one.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    step = functools.partial(one.model, input_ids=ids[:, :1], past_key_values=cache)
    return statistics.median(seconds(step, one.device, 2 * one.sizes.rounds, 1))
