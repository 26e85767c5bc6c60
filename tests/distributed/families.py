"""Families of decoders that transformers has a plan to shard, as checks of `worker`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adaskip_fx.api import build
from adaskip_fx.plans.skip_plan import SkipPlan
from tests.support.eager_reference import relative_error

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
_EXPERTS = {
    **{"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "moe_intermediate_size": 32,
}
_LATENT = {
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    **{"topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32},
    **{"num_key_value_heads": 4, "head_dim": 8},
}
#: Arguments of a tiny config, by model type.
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("qwen2", "qwen3", "phi3", "granite", "cohere", "glm4", "gpt_neox")},
    **{name: {} for name in ("starcoder2", "olmo2")},
    **{name: {"sliding_window": 8} for name in ("mistral", "gemma3_text")},
    **{name: _EXPERTS for name in ("qwen3_moe", "olmoe")},
    "gpt_oss": {**_EXPERTS, "sliding_window": 8},
    "deepseek_v3": _LATENT,
}


#: Mixtures whose experts are whole, each on one rank.
WHOLE_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def whole_experts(shared: Any) -> Any:
    """As `families`, of mixtures whose experts are whole."""
    return {name: _family(shared, name, ep_size=2) for name in WHOLE_EXPERTS}


def families(shared: Any) -> Any:
    """Logits and tokens of each family beside one process, and of a plan on all ranks."""
    return {name: _family(shared, name) for name in FAMILIES}


def _family(shared: Any, name: str, **spread_by: int) -> Any:
    config = AutoConfig.for_model(name, **{**_SIZES, **FAMILIES.get(name, _EXPERTS)})
    alone, spread = shared.pair(AutoModelForCausalLM, config, **spread_by)
    fast = build(spread, None, backend="eager")
    ids = torch.randint(1, 128, (2, 11), generator=torch.Generator().manual_seed(1))
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = alone(ids, logits_to_keep=1).logits
        got = fast(ids, logits_to_keep=1).logits
        made = fast.generate(ids, **more)
        plan = SkipPlan.of(fast.adaskip.sublayers, ["1.attention"])
        cache = fast.adaskip.new_cache(plan=plan)
        fast(ids, past_key_values=cache, logits_to_keep=1)
    return {
        "error": relative_error(got, expected),
        "generate": made.tolist() == alone.generate(ids, **more).tolist(),
        "stored": [keys is not None for keys in cache.keys],
        "experts": _local_experts(spread) if spread_by else None,
    }


def _local_experts(model: Any) -> int:
    """How many experts of a layer a rank has."""
    spread = (m for m in model.modules() if getattr(m, "_is_expert_parallel", False))
    (count,) = {int(module.num_experts) for module in spread}
    return count
