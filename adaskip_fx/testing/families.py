"""Tiny configurations of transformers' decoder families, as data.

A model of each has three layers (or two, where that shows all of it) and some thousand weights.
Sliding windows are of six tokens, so that a prompt of nine is longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
)
_Vary = tuple[tuple[str, tuple[Any, ...]], ...]
_USUAL: _Vary = (
    ("vocab_size", (61, 53)),
    ("hidden_size", (32, 48)),
    ("intermediate_size", (48, 40)),
    ("num_key_value_heads", (2, 4, 1)),
    ("tie_word_embeddings", (False, True)),
)


@dataclass(frozen=True)
class Family:
    """A kind of decoder.

    Attributes:
        kind: as transformers calls it (``model_type``).
        sizes: what a tiny configuration says besides the usual sizes.
        vary: names of settings, with the values that :func:`tiny_configs` draws from.
    """

    kind: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    vary: _Vary = ()

    @property
    def known(self) -> bool:
        """Whether the installed transformers has it."""
        return self.kind in CONFIG_MAPPING


def _usual(kind: str, **sizes: Any) -> Family:
    """One whose sizes may be varied as Llama's."""
    return Family(kind, sizes, tuple((n, v) for n, v in _USUAL if n not in sizes))


def _as_gpt2(kind: str, **sizes: Any) -> Family:
    own = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, **sizes}
    return Family(kind, own, (("vocab_size", (61, 53)), ("n_embd", (32, 48))))


_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}
_EAGER = {"attn_implementation": "eager"}  # transformers 5.17 leaves out the soft cap otherwise
_MOE = {**_ROUTED, "moe_intermediate_size": 32}
_SHARED_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": _LINEAR,
}
_SHARED_KV = {
    "head_dim": 8,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 6,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        # Llama and its like: attention, then FFN, each behind a norm
        "llama": _usual("llama"),
        "mistral": _usual("mistral", sliding_window=None),
        "mistral, sliding window": _usual("mistral", sliding_window=6),
        "ministral": _usual("ministral", sliding_window=6, layer_types=_SLIDING, head_dim=8),
        "qwen2": _usual("qwen2"),
        "qwen3": _usual("qwen3", head_dim=8),
        "gemma": _usual("gemma", head_dim=8),
        "smollm3": _usual("smollm3", no_rope_layers=[1, 0, 1]),
        "starcoder2": _usual("starcoder2", sliding_window=None),
        "granite": _usual("granite", residual_multiplier=0.22),
        "nemotron": _usual("nemotron"),
        "stablelm": _usual("stablelm", hidden_size=32),
        "olmo": _usual("olmo"),
        "phi3": _usual("phi3", tie_word_embeddings=False),
        "glm": _usual("glm", head_dim=8),
        "helium": _usual("helium", head_dim=8, hidden_size=32),
        "seed_oss": _usual("seed_oss", head_dim=8),
        "apertus": _usual("apertus"),
        "arcee": _usual("arcee"),
        "ernie4_5": _usual("ernie4_5", head_dim=8),
        "hunyuan_v1_dense": _usual("hunyuan_v1_dense", head_dim=8),
        "persimmon": Family("persimmon", {"num_key_value_heads": 4}),
        "opt": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        "gpt2": _as_gpt2("gpt2", n_inner=48),
        "gpt_bigcode": _as_gpt2("gpt_bigcode", n_inner=48),
        "gpt_neo": Family(
            "gpt_neo",
            {
                "num_hidden_layers": 2,
                "num_layers": 2,
                "num_heads": 4,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 6,
            },
        ),
        "gpt_neox, sequential": Family("gpt_neox", {"use_parallel_residual": False}),
        "bloom": Family("bloom", {"n_layer": 3, "n_head": 4}),
        "mpt": Family(
            "mpt",
            {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256, "expansion_ratio": 2},
        ),
        "xglm": Family("xglm", {"d_model": 32, "num_layers": 3, "attention_heads": 4}),
        "biogpt": Family("biogpt"),
        # norms after the branch, or on both sides of it
        "gemma2": _usual("gemma2", head_dim=8, sliding_window=6, **_EAGER),
        "gemma3": _usual("gemma3_text", head_dim=8, sliding_window=6, layer_types=_SLIDING),
        "vaultgemma": _usual("vaultgemma", head_dim=8, sliding_window=6, **_EAGER),
        "olmo2": _usual("olmo2"),
        "olmo3": _usual("olmo3", sliding_window=6, layer_types=_SLIDING),
        "glm4": _usual("glm4", head_dim=8),
        "exaone4": _usual("exaone4", sliding_window=6, layer_types=_SLIDING),
        # attention and FFN in parallel
        "gpt_neox": Family("gpt_neox"),
        "gptj": _as_gpt2("gptj", rotary_dim=8),
        "codegen": _as_gpt2("codegen", rotary_dim=8),
        "phi": Family("phi"),
        "cohere": _usual("cohere"),
        "cohere2": _usual("cohere2", sliding_window=6, layer_types=_SLIDING),
        "stablelm, parallel": Family("stablelm", {"use_parallel_residual": True}),
        "falcon, new decoder": Family(
            "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}
        ),
        "falcon, parallel": Family("falcon", {"multi_query": True, "parallel_attn": True}),
        "falcon, sequential": Family(
            "falcon", {"parallel_attn": False, "multi_query": False, "bias": True}
        ),
        "falcon, alibi": Family(
            "falcon", {"alibi": True, "parallel_attn": False, "multi_query": False}
        ),
        # experts
        "mixtral": _usual("mixtral", num_local_experts=4),
        "qwen2_moe": _usual("qwen2_moe", **_MOE, shared_expert_intermediate_size=32),
        "qwen3_moe": _usual("qwen3_moe", **_MOE, head_dim=8),
        "olmoe": _usual("olmoe", **_ROUTED),
        "flex_olmo": _usual("flex_olmo", **_ROUTED),
        "phimoe": _usual("phimoe", num_local_experts=4),
        "granitemoe": _usual("granitemoe", num_local_experts=4, residual_multiplier=0.22),
        "granitemoeshared": _usual(
            "granitemoeshared", num_local_experts=4, shared_intermediate_size=32
        ),
        "gpt_oss": Family(
            "gpt_oss",
            {
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "head_dim": 8,
                "sliding_window": 6,
                "layer_types": _SLIDING,
            },
        ),
        "minimax_m2": _usual("minimax_m2", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
        "glm4_moe": Family("glm4_moe", {**_SHARED_MOE, "head_dim": 8}),
        "dots1": Family("dots1", {**_SHARED_MOE, "n_shared_experts": 1}),
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
            "deepseek_v2", {**_SHARED_MOE, **_LATENT, "n_group": 2, "topk_method": "greedy"}
        ),
        "deepseek_v3": Family("deepseek_v3", {**_SHARED_MOE, **_LATENT, "n_group": 2}),
        "minicpm3": Family("minicpm3", _LATENT),
        # mixers with a state, alone or between attention
        "mamba": Family("mamba", {"state_size": 8, "time_step_rank": 4}),
        "falcon_mamba": Family("falcon_mamba", {"state_size": 8, "time_step_rank": 4}),
        "mamba2": Family(
            "mamba2",
            {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        ),
        "bamba": Family("bamba", {**_MAMBA2, "attn_layer_indices": [1]}),
        "jamba": Family(
            "jamba",
            {
                **_ROUTED,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "attn_layer_period": 3,
                "attn_layer_offset": 1,
                "mamba_d_state": 8,
                "mamba_dt_rank": 4,
                "use_mamba_kernels": False,
            },
        ),
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
                **_LATENT,
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
                **_LATENT,
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
                **_SHARED_MOE,
                **_LATENT,
                "n_group": 2,
                "index_n_heads": 2,
                "index_head_dim": 8,
                "index_topk": 4,
            },
        ),
    }
)


def tiny_config(family: str, **changes: Any) -> Any:
    """A tiny configuration of a family.

    Args:
        family: one of `FAMILIES`.
        changes: settings that replace those of the table.
    """
    found = FAMILIES[family]
    return AutoConfig.for_model(found.kind, **{**_SIZES, **found.sizes, **changes})


def tiny_model(config: Any, seed: int = 0) -> Any:
    """A model with weights so large that every sublayer matters to the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias", "e_score_correction_bias")):
            continue  # where any value is not a value: as it was initialised
        low, high = (-0.3, 0.3) if parameter.dim() > 1 else (0.5, 1.5)
        parameter.uniform_(low, high)
    return model
