"""Attention as it is lowered while capturing: maskless where a mask would only say "causal".

transformers' sdpa path builds a boolean mask at every decode step of a static cache, and a mask
makes it repeat every K/V head. Captured under the name ``adaskip`` instead, a prompt without
padding runs ``is_causal=True``, a decoded token attends to the filled cache without a mask, and
heads stay grouped. Everything else (padding, chunks on a filled cache, sliding windows) gets the
mask that transformers' own mask functions make. Soft caps on the scores (Gemma 2) and attention
sinks (GPT-OSS) have no place in PyTorch's fused kernels: there attention is written out, which
takes memory for all scores of a prompt.

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

from adaskip_passes.decode.ops import attend

from ..utils.transformers_internals import attention_name, can_set_attention
from ..utils.transformers_types import CausalLM

NAME = "adaskip"


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention of `query` [B, H, T, D] over `key`, `value` [B, H_kv, S, D], heads grouped.

    Without a mask: causal when T > 1 (then S = T), all of S when T = 1. An integer for a mask says
    how many of the keys count (see :func:`mask`). `softcap` bounds the scores; `s_aux` [H] are
    scores of a sink, which takes attention and gives nothing.

    Returns:
        The output [B, T, H, D], and None for the attention weights.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if softcap is not None or s_aux is not None:
        written = _written_out(query, key, value, attention_mask, scale, softcap, s_aux)
        return written, None
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return attend(query, key, value, attention_mask, scale), None
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
        scale=scale,
        enable_gqa=grouped,
    )
    return output.transpose(1, 2).contiguous(), None


def is_own(model: CausalLM) -> bool:
    """Return whether a model's attention is a function that a user registered.

    It is traced as it is, since what it computes is not known: only transformers' own may be
    exchanged for ours.
    """
    name = attention_name(model)
    if (
        not can_set_attention(model) or name in (None, NAME, "eager") or "/" in name
    ):  # "/": of the hub
        return False
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    function = getattr(function, "func", function)
    module = str(getattr(function, "__module__", ""))
    return not module.startswith("transformers.")


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return attention with a soft cap or sinks, softmax in float32; see `attention`."""
    batch, heads, tokens, dim = query.shape
    kv_heads, stored = key.shape[1], key.shape[2]
    groups = query.reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    scores = torch.matmul(groups, key.unsqueeze(2).transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(stored, device=query.device)
    seen: torch.Tensor | None = None  # broadcast to [B, H_kv, G, T, S]
    if attention_mask is None:
        if tokens > 1:
            seen = position <= position[:tokens].unsqueeze(1)
    elif attention_mask.dtype == torch.int64:
        seen = position < attention_mask.unsqueeze(2)
    else:
        seen = attention_mask.unsqueeze(2)
    if seen is not None:  # not infinity: a padding token sees nothing, and must not become NaN
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.float().view(1, kv_heads, heads // kv_heads, 1, 1)
        scores = torch.cat((scores, sink.expand(batch, -1, -1, tokens, -1)), -1)
    shares = torch.softmax(scores, -1)[..., :stored].to(value.dtype)
    output = torch.matmul(shares, value.unsqueeze(2)).reshape(batch, heads, tokens, dim)
    return output.transpose(1, 2).contiguous()


def mask(
    *,
    q_length: int,
    q_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return the mask for :func:`attention`: None where it needs none, else bool [B, 1, T, S].

    None is right for plain causal attention without padding when the queries begin the sequence
    (``q_offset == 0``) or there is one query, which sees all that is stored. Where the position is
    on the device (a tensor), the one query sees the part of the buffers that is filled: the mask
    is that many keys, int64 [1, 1, 1, 1].
    """
    plain = mask_function is causal_mask_function and attention_mask is None
    if isinstance(q_offset, torch.Tensor) and plain and q_length == 1:
        return (q_offset + 1).view(1, 1, 1, 1)
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
