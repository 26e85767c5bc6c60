"""Families whose layers, all or some, have a mixer with a state."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from adaskip_fx.testing.families import FAMILIES, LATENT, ROUTED, Family

_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
_MOE = {**ROUTED, "moe_intermediate_size": 32}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": _LINEAR,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}

MIXERS: Mapping[str, Family] = MappingProxyType(
    {
        # mixers with a state, alone or between attention
        "mamba": Family("mamba", {"state_size": 8, "time_step_rank": 4}),
        "falcon_mamba": Family("falcon_mamba", {"state_size": 8, "time_step_rank": 4}),
        "mamba2": FAMILIES["mamba2"],
        "bamba": Family("bamba", {**_MAMBA2, "attn_layer_indices": [1]}),
        "jamba": FAMILIES["jamba"],
        "zamba2": Family(
            "zamba2",
            {
                "mamba_d_state": 8,
                "mamba_ngroups": 1,
                "n_mamba_heads": 8,
                "mamba_headdim": 8,
                "use_mamba_kernels": False,
                "layers_block_type": ["mamba", "hybrid", "mamba"],
                "hybrid_layer_ids": [1],
                "num_mem_blocks": 1,
                "use_mem_rope": True,
            },
        ),
        "falcon_h1": Family("falcon_h1", {**_MAMBA2, "mamba_d_ssm": 64, "head_dim": 8}),
        "granitemoehybrid": Family(
            "granitemoehybrid",
            {
                **_MAMBA2,
                "num_local_experts": 4,
                "shared_intermediate_size": 32,
                "layer_types": ["mamba", "attention", "mamba"],
                "residual_multiplier": 0.22,
            },
        ),
        "nemotron_h": Family(
            "nemotron_h",
            {
                "hybrid_override_pattern": "M*-M",
                "num_hidden_layers": 4,
                "mamba_num_heads": 8,
                "mamba_head_dim": 8,
                "ssm_state_size": 8,
                "n_groups": 1,
                "head_dim": 8,
                "use_mamba_kernels": False,
            },
        ),
        "qwen3_next": Family(
            "qwen3_next", {**_DELTA, **_MOE, "head_dim": 8, "shared_expert_intermediate_size": 32}
        ),
        "qwen3_5": Family("qwen3_5_text", {**_DELTA, "head_dim": 8}),
        "olmo_hybrid": Family("olmo_hybrid", {**_DELTA, "linear_num_key_heads": 4}),
        "lfm2": Family(
            "lfm2",
            {
                "layer_types": ["conv", "full_attention", "conv"],
                "conv_L_cache": 3,
                "block_multiple_of": 8,
            },
        ),
        "lfm2_moe": Family(
            "lfm2_moe",
            {
                **_MOE,
                "layer_types": ["conv", "full_attention", "conv"],
                "conv_L_cache": 3,
                "num_dense_layers": 1,
            },
        ),
        "kimi_linear": Family(
            "kimi_linear",
            {
                **LATENT,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "linear_attn_config": {
                    "kda_layers": [1, 3],
                    "full_attn_layers": [2],
                    "head_dim": 8,
                    "num_heads": 4,
                    "short_conv_kernel_size": 4,
                },
            },
        ),
    }
)
