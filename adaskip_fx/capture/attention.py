"""Attention as it is lowered while capturing: maskless where a mask would only say "causal".

transformers' sdpa path builds a boolean mask at every decode step of a static cache, and a mask
makes it repeat every K/V head. Captured under the name ``adaskip`` instead, a prompt without
padding and more tokens on a filled cache run `attend_causal` (a prompt on a CPU
``is_causal=True``), and heads stay grouped. On a static cache a mask is a table of bounds, for
:func:`attend`: padding, sliding windows, soft caps on the scores (Gemma 2) and attention sinks
(GPT-OSS) are its inputs.
In prompts without a mask they are inputs of :func:`attend_windowed`, as sliding windows are.
Everything else gets the mask that transformers' own mask functions make; soft caps and sinks have
no place in PyTorch's fused kernels, and there attention is written out, which takes memory for all
scores of a prompt.

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

from adaskip_passes.attention.ops import attend_causal, attend_packed
from adaskip_passes.decode.ops import EVERY, attend
from adaskip_passes.windows.ops import (
    attend_masked_windowed,
    attend_packed_windowed,
    attend_windowed,
)

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

    Without a mask, the queries are the last T of the S tokens, and causal. A mask of integers is a
    table of bounds, or offsets of packed rows (see :func:`mask`). `softcap` bounds the scores;
    `s_aux` [H] are scores of a sink, which takes attention and gives nothing.

    Returns:
        The output [B, T, H, D], and None for the attention weights.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if torch.is_autocast_enabled(query.device.type):  # as it does PyTorch's own attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    written = softcap is not None or s_aux is not None
    more: tuple[Any, ...] = (scale, softcap or 0.0, s_aux) if written else (scale,)
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        return _packed(query, key, value, attention_mask, more), None
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return attend(query, key, value, attention_mask, scale, softcap or 0.0, s_aux), None
    window = EVERY if written and attention_mask is None else _window_of(attention_mask)
    if window is not None:
        return attend_windowed(query, key, value, None, window, *more), None
    if written:
        return attend_masked_windowed(query, key, value, attention_mask, None, *more), None
    causal = False
    if attention_mask is None and query.shape[2] > 1:  # a symbolic bool is not accepted below
        if query.device.type == "cuda" or query.shape[2] != key.shape[2]:
            return attend_causal(query, key, value, scale), None
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


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    more: tuple[Any, ...],
) -> torch.Tensor:
    """Return attention within packed rows; of [window, rows + 1] as many tokens are seen.

    `more` is a scale, and may be a soft cap and sinks after it.
    """
    plain, window = mask.dim() == 1, mask.shape[0] if mask.dim() == 2 else EVERY
    if plain and len(more) == 1:
        output: torch.Tensor = attend_packed(query, key, value, mask, *more)
    else:
        offsets = mask if plain else mask[0]
        output = attend_packed_windowed(query, key, value, offsets, None, window, *more)
    return output


def _window_of(mask: torch.Tensor | None) -> int | None:
    """Return the window that a mask without rows stands for; None for any other mask."""
    without_rows = mask is not None and mask.dim() == 4 and mask.shape[0] == 0
    return mask.shape[3] if mask is not None and without_rows else None


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


def mask(
    *,
    batch_size: int,
    q_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return the mask for :func:`attention`: None where it needs none, else bool [B, 1, T, S].

    None is right for plain causal attention without padding. Where positions are on the device (a
    tensor), whole buffers are read by bounds: the mask is a table of them, int64 [B, 1, 1, 5] (see
    `adaskip_passes.decode.ops.Bounds`); `kv_offset` are the rows' first tokens then. Of packed rows
    it is where each begins, which is their `kv_offset`, int32 [rows + 1]. A sliding window alone is
    a mask of no rows, whose width is the window: bool [0, 1, 1, window], of four dimensions since
    models cut masks (Gemma 4, to the last query); of packed rows their beginnings so often, int32
    [window, rows + 1], which takes no memory.

    Raises:
        NotImplementedError: bounds or offsets cannot say what the mask says.
    """
    plain = mask_function is causal_mask_function and attention_mask is None
    sliding = local_size if attention_mask is None and not use_vmap else None
    chunked = sliding is not None and getattr(config, "attention_chunk_size", None) == sliding
    if isinstance(q_offset, torch.Tensor):
        # (a mask over whole buffers will do where rows' first tokens are not on the device)
        if plain or isinstance(kv_offset, torch.Tensor):
            window = EVERY if plain else _window_at(sliding, chunked, q_length, q_offset, kv_offset)
            return _bounds(q_offset, kv_offset, window).expand(batch_size, -1, -1, -1)
    elif isinstance(kv_offset, torch.Tensor):
        return _offsets(kv_offset, plain, None if chunked else sliding)
    elif plain:
        return None
    elif sliding is not None and not chunked:
        return torch.empty(0, 1, 1, sliding, dtype=torch.bool)
    result: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        local_size=local_size,
        use_vmap=use_vmap,
        config=config,
        **kwargs,
    )
    return result


def _window_at(
    sliding: int | None,
    chunked: bool,
    tokens: int,
    position: torch.Tensor,
    first: int | torch.Tensor,
) -> int | torch.Tensor:
    """Return the window of a table of bounds; of a chunk, what there is of it."""
    if sliding is None:
        raise NotImplementedError("attention that a table of bounds cannot describe")
    if not chunked:
        return sliding
    if tokens > 1:
        raise NotImplementedError("several queries at the end of a chunk")
    return (position - first) % sliding + 1


def _offsets(begins: torch.Tensor, plain: bool, sliding: int | None) -> torch.Tensor:
    """Return the mask of packed rows; see `mask`."""
    if plain:
        return begins
    if sliding is None:
        raise NotImplementedError("a packed prompt with more than causal attention")
    return begins.expand(sliding, -1)


def _bounds(
    position: torch.Tensor, first: int | torch.Tensor, window: int | torch.Tensor
) -> torch.Tensor:
    """Return the table for queries from `position` [B] on; see `Bounds` for its columns."""
    zeros = torch.zeros_like(position)
    columns = (zeros + first, zeros, zeros + window, position + 1, zeros)
    return torch.stack(columns, -1).view(-1, 1, 1, len(columns))


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
