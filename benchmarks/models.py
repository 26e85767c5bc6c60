"""The models that are measured: shapes of known ones, random weights (values do not matter)."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adaskip_fx.api import build
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
}


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def llama(**changes: Any) -> Any:
    """A random Llama: 8B in bfloat16 on a GPU; a tiny one in float32 elsewhere."""
    where = device()
    shape = LLAMA_8B if where.type == "cuda" else TINY
    config = LlamaConfig(**{**shape, "eos_token_id": None, "pad_token_id": None, **changes})
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if where.type == "cuda" else torch.float32)
    try:
        with where:
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def shape_8b() -> Any:
    """The 8B Llama in bfloat16 without its weights, for what its floors promise."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**LLAMA_8B)).to(torch.bfloat16)


@functools.cache
def pair() -> tuple[Any, Any]:
    """The model, and the same compiled; made once in a process, so that workloads share it."""
    model = llama()
    backend = "inductor" if device().type == "cuda" else "eager"
    return model, build(model, None, backend=backend)


def random_plan(sublayers: Sequence[Sublayer], skip: int, seed: int = 0) -> SkipPlan:
    """`skip` sublayers at random, but not the first two or the last two, each with a scale."""
    draw = random.Random(seed)
    chosen = draw.sample(list(sublayers[2:-2]), skip)
    factors = {s: draw.uniform(0.9, 1.1) for s in chosen}
    return SkipPlan.of(sublayers, chosen, surrogates=Surrogates.scale(factors))


def tokens(batch: int, count: int) -> torch.Tensor:
    """Random token ids int64 [batch, count]."""
    return torch.randint(0, 250, (batch, count), device=device())
