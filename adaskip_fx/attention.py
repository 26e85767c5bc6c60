"""Attention as it is lowered while capturing: maskless where a mask would only say "causal".

transformers' sdpa path builds a boolean mask at every decode step of a static cache, and a mask
makes it repeat every K/V head. Captured under the name ``adaskip`` instead, a prompt without
padding runs ``is_causal=True``, a decoded token attends to the filled cache without a mask, and
heads stay grouped. Everything else (padding, chunks on a filled cache, sliding windows) gets the
mask that transformers' own mask functions make.

Importing this module adds the one name to transformers' two registries; no config is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaskip_passes import RefusedError

NAME = "adaskip"

#: arguments that some models hand to attention and that change its result
_UNSUPPORTED = {"softcap": "attention logit soft caps", "s_aux": "attention sinks"}


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` [B, H, T, D] over `key`, `value` [B, H_kv, S, D], grouped heads.

    Without a mask: causal when T > 1 (then S = T), all of S when T = 1.

    Returns:
        The output [B, T, H, D], and None for the attention weights.
    """
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise RefusedError(f"{what} ({name}) are not supported yet: {type(module).__name__}")
    causal = False
    if attention_mask is None and query.shape[2] > 1:  # a symbolic bool is not accepted below
        causal = True
    grouped = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=grouped,
    )
    return output.transpose(1, 2).contiguous(), None


def mask(
    *,
    q_length: int,
    q_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask for :func:`attention`: None where it needs none, else bool [B, 1, T, S].

    None is right for plain causal attention without padding when the queries begin the sequence
    (``q_offset == 0``) or there is one query, which sees all that is stored.
    """
    plain = mask_function is causal_mask_function and attention_mask is None
    if plain and (q_length == 1 or q_offset == 0):
        return None
    result: torch.Tensor | None = sdpa_mask(
        q_length=q_length,
        q_offset=q_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **kwargs,
    )
    return result


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
