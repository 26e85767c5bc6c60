"""Families that are refused so far, each for a reason of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from adaskip_fx.testing.families import LATENT, SHARED_MOE, Family

_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
_SHARED_KV = {
    "head_dim": 8,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 6,
}

REFUSED: Mapping[str, Family] = MappingProxyType(
    {
        # refused so far, each for a reason of its own
        "gemma3n": Family(
            "gemma3n_text",
            {
                **_SHARED_KV,
                "laurel_rank": 4,
                "altup_num_inputs": 2,
                "activation_sparsity_pattern": [0.0] * 4,
            },
        ),
        "gemma4": Family("gemma4_text", {**_SHARED_KV, "global_head_dim": 8}),
        "rwkv": Family("rwkv", {"attention_hidden_size": 32, "num_hidden_layers": 2}),
        "recurrent_gemma": Family(
            "recurrent_gemma",
            {
                "lru_width": 32,
                "attention_window_size": 6,
                "head_dim": 8,
                "num_hidden_layers": 2,
                "block_types": ["recurrent", "attention"],
            },
        ),
        "minimax": Family(
            "minimax", {"head_dim": 8, "num_local_experts": 4, "layer_types": _LINEAR}
        ),
        "xlstm": Family(
            "xlstm",
            {
                "num_heads": 4,
                "num_blocks": 3,
                "chunkwise_kernel": "chunkwise--native_autograd",
                "sequence_kernel": "native_sequence__native",
                "step_kernel": "native",
            },
        ),
        "ctrl": Family(
            "ctrl", {"n_embd": 32, "dff": 48, "n_layer": 3, "n_head": 4, "n_positions": 256}
        ),
        "doge": Family("doge", {"head_dim": 8}),
        "longcat_flash": Family(
            "longcat_flash",
            {
                **LATENT,
                "ffn_hidden_size": 48,
                "expert_ffn_hidden_size": 32,
                "moe_topk": 2,
                "n_routed_experts": 4,
                "zero_expert_num": 2,
                "num_layers": 2,
                "head_dim": 4,
            },
        ),
        "deepseek_v32": Family(
            "deepseek_v32",
            {
                **SHARED_MOE,
                **LATENT,
                "n_group": 2,
                "index_n_heads": 2,
                "index_head_dim": 8,
                "index_topk": 4,
            },
        ),
    }
)
