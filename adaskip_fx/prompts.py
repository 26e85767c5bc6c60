"""What is done to prompts before they run: where they lie, and where they are cut."""

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


#: input_ids [B, T], attention_mask [B, stored + T] and position_ids [B or 1, T] of a step.
Inputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def cut_last_token(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> tuple[Inputs | None, Inputs]:
    """A prompt in two: what is before its last token (None if nothing is), and that token.

    Of padded rows the last column is cut off: rows are padded on the left, as ``generate`` needs
    them, so it holds every row's last token.
    """
    last = input_ids[:, -1:]
    last_position = None if position_ids is None else position_ids[:, -1:]
    tail = last.contiguous(), attention_mask, last_position
    if input_ids.shape[1] == 1:
        return None, tail
    head = (
        input_ids[:, :-1].contiguous(),
        None if attention_mask is None else attention_mask[:, :-1],
        None if position_ids is None else position_ids[:, :-1],
    )
    return head, tail
