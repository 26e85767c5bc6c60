"""What transformers does not promise of experts and routers, as adaskip_fx reads it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate, _grouped_linear

#: The class whose gate has clamps.
_CLAMPED = ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts")
_SILU = (torch.nn.SiLU, type(ACT2FN["silu"]))


def experts_gate(experts: Any) -> tuple[float, float] | None:
    """Return clamp and alpha of experts' gate, 0 and 0 for SwiGLU; None for any other one."""
    kind = type(experts)
    if kind._apply_gate is _default_apply_gate:
        is_silu = hasattr(experts, "act_fn") and isinstance(experts.act_fn, _SILU)
        return (0.0, 0.0) if is_silu else None
    if (kind.__module__, kind.__name__) == _CLAMPED:
        return float(experts.limit), float(experts.alpha)
    return None


def has_plain_experts(experts: Any) -> bool:
    """Return whether a token's experts are a gated projection up and one down, all on one device.

    (Nothing is done after them, and no expert's weights are elsewhere.)
    """
    normed = hasattr(experts, "has_post_expert_norm") and experts.has_post_expert_norm
    spread = hasattr(experts, "_is_expert_parallel") and experts._is_expert_parallel
    return bool(experts.has_gate) and not normed and not spread


def grouped_product(
    rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """Return the products of rows [S, n], sorted by expert, with the weights of their experts.

    Args:
        rows: each expert's follow one another.
        weights: [E, m, n], or [E, n, m] if they are transposed.
        ends: where each expert's rows end, int32 [E].
        transposed: whether outputs come last.
    """
    product: torch.Tensor = _grouped_linear(rows, weights, ends, is_transposed=transposed)
    return product


def router_class(model: Any) -> type | None:
    """Return the class of the modules whose router logits a model gives; None if it gives none."""
    recorded = getattr(type(model), "_can_record_outputs", None) or {}
    recorder = recorded.get("router_logits")
    kind = getattr(recorder, "target_class", recorder)
    return kind if isinstance(kind, type) else None
