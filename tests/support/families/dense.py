"""Families with attention and an FFN in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from adaskip_fx.testing.families import EAGER, FAMILIES, SLIDING, Family, gpt2_like, llama_like

DENSE: Mapping[str, Family] = MappingProxyType(
    {
        # Llama and its like: attention, then FFN, each behind a norm
        "llama": FAMILIES["llama"],
        "mistral": FAMILIES["mistral"],
        "mistral, sliding window": llama_like("mistral", sliding_window=6),
        "ministral": llama_like("ministral", sliding_window=6, layer_types=SLIDING, head_dim=8),
        "qwen2": llama_like("qwen2"),
        "qwen3": FAMILIES["qwen3"],
        "gemma": llama_like("gemma", head_dim=8),
        "smollm3": llama_like("smollm3", no_rope_layers=[1, 0, 1]),
        "starcoder2": llama_like("starcoder2", sliding_window=None),
        "granite": llama_like("granite", residual_multiplier=0.22),
        "nemotron": llama_like("nemotron"),
        "stablelm": llama_like("stablelm", hidden_size=32),
        "olmo": llama_like("olmo"),
        "phi3": FAMILIES["phi3"],
        "glm": llama_like("glm", head_dim=8),
        "helium": llama_like("helium", head_dim=8, hidden_size=32),
        "seed_oss": llama_like("seed_oss", head_dim=8),
        "apertus": llama_like("apertus"),
        "arcee": llama_like("arcee"),
        "ernie4_5": llama_like("ernie4_5", head_dim=8),
        "hunyuan_v1_dense": llama_like("hunyuan_v1_dense", head_dim=8),
        "persimmon": Family("persimmon", {"num_key_value_heads": 4}),
        "opt": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        "gpt2": FAMILIES["gpt2"],
        "gpt_bigcode": gpt2_like("gpt_bigcode", n_inner=48),
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
        "gemma2": FAMILIES["gemma2"],
        "gemma3": llama_like("gemma3_text", head_dim=8, sliding_window=6, layer_types=SLIDING),
        "vaultgemma": llama_like("vaultgemma", head_dim=8, sliding_window=6, **EAGER),
        "olmo2": llama_like("olmo2"),
        "olmo3": llama_like("olmo3", sliding_window=6, layer_types=SLIDING),
        "glm4": llama_like("glm4", head_dim=8),
        "exaone4": llama_like("exaone4", sliding_window=6, layer_types=SLIDING),
        # attention and FFN in parallel
        "gpt_neox": FAMILIES["gpt_neox"],
        "gptj": gpt2_like("gptj", rotary_dim=8),
        "codegen": gpt2_like("codegen", rotary_dim=8),
        "phi": Family("phi"),
        "cohere": llama_like("cohere"),
        "cohere2": llama_like("cohere2", sliding_window=6, layer_types=SLIDING),
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
    }
)
