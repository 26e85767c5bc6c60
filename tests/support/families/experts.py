"""Families with experts, and with attention over a latent cache."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from adaskip_fx.testing.families import FAMILIES, LATENT, ROUTED, SHARED_MOE, Family, llama_like

_MOE = {**ROUTED, "moe_intermediate_size": 32}

EXPERTS: Mapping[str, Family] = MappingProxyType(
    {
        # experts
        "mixtral": FAMILIES["mixtral"],
        "qwen2_moe": llama_like("qwen2_moe", **_MOE, shared_expert_intermediate_size=32),
        "qwen3_moe": llama_like("qwen3_moe", **_MOE, head_dim=8, norm_topk_prob=True),
        "olmoe": llama_like("olmoe", **ROUTED),
        "flex_olmo": llama_like("flex_olmo", **ROUTED),
        "phimoe": llama_like("phimoe", num_local_experts=4),
        "granitemoe": llama_like("granitemoe", num_local_experts=4, residual_multiplier=0.22),
        "granitemoeshared": llama_like(
            "granitemoeshared", num_local_experts=4, shared_intermediate_size=32
        ),
        "gpt_oss": FAMILIES["gpt_oss"],
        "minimax_m2": llama_like(
            "minimax_m2", num_local_experts=4, num_experts_per_tok=2, head_dim=8
        ),
        "glm4_moe": Family("glm4_moe", {**SHARED_MOE, "head_dim": 8}),
        "dots1": Family("dots1", {**SHARED_MOE, "n_shared_experts": 1}),
        "ernie4_5_moe": Family(
            "ernie4_5_moe",
            {
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_intermediate_size": 32,
                "moe_layer_start_index": 1,
            },
        ),
        "llama4": Family(
            "llama4_text",
            {
                "head_dim": 8,
                "num_local_experts": 4,
                "intermediate_size_mlp": 48,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 6,
                "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
                "no_rope_layers": [1, 1, 0],
            },
        ),
        "jetmoe": Family(
            "jetmoe",
            {
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "kv_channels": 8,
                "num_key_value_heads": 2,
            },
        ),
        # attention over a latent cache
        "deepseek_v2": Family(
            "deepseek_v2", {**SHARED_MOE, **LATENT, "n_group": 2, "topk_method": "greedy"}
        ),
        "deepseek_v3": FAMILIES["deepseek_v3"],
        "minicpm3": Family("minicpm3", LATENT),
    }
)
