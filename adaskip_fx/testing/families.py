"""Tiny configurations of a dozen decoder families of transformers', as data.

A model of each has three layers and some thousand weights. Sliding windows are of six tokens, so
that a prompt of nine is longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

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
        kind: its name in transformers (``model_type``).
        sizes: what a tiny configuration says besides the usual sizes.
        vary: names of settings, with the values that :func:`tiny_configs` draws from.
    """

    kind: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    vary: _Vary = ()

    def config(self, **changes: Any) -> Any:
        """Return a tiny configuration; `changes` are settings that replace those of the table."""
        return AutoConfig.for_model(self.kind, **{**_SIZES, **self.sizes, **changes})

    @property
    def known(self) -> bool:
        """Whether the installed transformers has it."""
        return self.kind in CONFIG_MAPPING


def llama_like(kind: str, **sizes: Any) -> Family:
    """Return a family whose sizes may be varied as Llama's."""
    return Family(kind, sizes, tuple((n, v) for n, v in _USUAL if n not in sizes))


def gpt2_like(kind: str, **sizes: Any) -> Family:
    """Return a family whose sizes have the names of GPT-2's."""
    named = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, **sizes}
    return Family(kind, named, (("vocab_size", (61, 53)), ("n_embd", (32, 48))))


SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}
EAGER = {"attn_implementation": "eager"}  # transformers 5.17 leaves out the soft cap otherwise
SHARED_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}

#: The families that :func:`tiny_configs` draws configurations of, by name.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": llama_like("llama"),
        "mistral": llama_like("mistral", sliding_window=None),
        "qwen3": llama_like("qwen3", head_dim=8),
        "gemma2": llama_like("gemma2", head_dim=8, sliding_window=6, **EAGER),
        "phi3": llama_like("phi3", tie_word_embeddings=False),
        "gpt2": gpt2_like("gpt2", n_inner=48),
        "gpt_neox": Family("gpt_neox"),
        "mixtral": llama_like("mixtral", num_local_experts=4),
        "gpt_oss": Family(
            "gpt_oss",
            {
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "head_dim": 8,
                "sliding_window": 6,
                "layer_types": SLIDING,
            },
        ),
        "deepseek_v3": Family("deepseek_v3", {**SHARED_MOE, **LATENT, "n_group": 2}),
        "mamba2": Family(
            "mamba2",
            {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        ),
        "jamba": Family(
            "jamba",
            {
                **ROUTED,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "attn_layer_period": 3,
                "attn_layer_offset": 1,
                "mamba_d_state": 8,
                "mamba_dt_rank": 4,
                "use_mamba_kernels": False,
            },
        ),
    }
)


def tiny_config(family: str, **changes: Any) -> Any:
    """Return a tiny configuration of a family.

    Args:
        family: one of `FAMILIES`.
        changes: settings that replace those of the table.
    """
    return FAMILIES[family].config(**changes)


def tiny_model(config: Any, seed: int = 0) -> Any:
    """Return a model with weights so large that every sublayer matters to the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias", "e_score_correction_bias")):
            continue  # other values make no sense there: they stay as initialised
        low, high = (-0.3, 0.3) if parameter.dim() > 1 else (0.5, 1.5)
        parameter.uniform_(low, high)
    return model
