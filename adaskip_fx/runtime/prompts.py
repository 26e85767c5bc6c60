"""Where a prompt lies in the space of input embeddings, by which a plan may be chosen for it."""

from __future__ import annotations

from typing import Any

import torch

_CHUNK = 1024  # tokens that are embedded at once: float32 is twice a model's own width


@torch.no_grad()
def mean_embedding(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean input embedding [hidden] of a prompt, float32 on the device.

    Of a batch: the mean over each row's tokens, padding left out, then over rows.

    Args:
        model: a transformers decoder.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 0 at padding.
    """
    embed = model.get_input_embeddings()
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    weights = valid.to(torch.float32)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1.0)
    total: torch.Tensor | None = None
    for ids, share in zip(
        torch.split(input_ids, _CHUNK, 1), torch.split(weights, _CHUNK, 1), strict=True
    ):
        part = torch.einsum("bt,bth->h", share, embed(ids).to(torch.float32))
        total = part if total is None else total + part
    assert total is not None
    return total / input_ids.shape[0]
