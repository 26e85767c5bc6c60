"""Operators of attention over prompts, and how they are computed in plain torch.

PyTorch's fused kernels know a causal mask whose queries begin the sequence. Queries that end it
(a chunk of a long prompt, the next turn of a conversation) get a mask of booleans there, as large
as the scores; and rows that are padded get one for every key that is padding.
"""

from __future__ import annotations

import itertools

import torch
from torch.nn.functional import scaled_dot_product_attention

# (An operator of `torch.library.custom_op` takes longer to call, at every layer of a prompt.)
torch.library.define(
    "adaskip::attend_causal",
    "(Tensor query, Tensor key, Tensor value, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attend_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend with the last T of S tokens to all of them, causally; K/V heads are not repeated.

    (`torch.nn.attention.bias.causal_lower_right` says the same, but runs on flash attention alone,
    which is slower than cuDNN's on Hopper, and not in float32.)

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, S, D]; H is a multiple of H_kv.
        value: [B, H_kv, S, D_v].
        scale: Of the scores.

    Returns:
        [B, T, H, D_v], contiguous.

    """
    output: torch.Tensor = torch.ops.adaskip.attend_causal.default(query, key, value, scale)
    return output


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return what `attend_causal` does by PyTorch's attention; in part of S with a mask [T, S]."""
    tokens, stored = query.shape[2], key.shape[2]
    seen = None
    if tokens != stored:
        seen = torch.ones(tokens, stored, dtype=torch.bool, device=query.device)
        seen = seen.tril(stored - tokens)
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen,
        is_causal=seen is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()


torch.library.impl("adaskip::attend_causal", "default", causal)  # on any device


def _shaped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[3]))


torch.library.register_fake("adaskip::attend_causal", _shaped)


@torch.library.custom_op("adaskip::attend_packed", mutates_args=())
def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend causally within each of several texts that follow one another in one row.

    Args:
        query: [1, H, N, D].
        key: [1, H_kv, N, D]; H is a multiple of H_kv.
        value: [1, H_kv, N, D_v].
        offsets: Where each text begins, and N: int32 [texts + 1], on the CPU.
        scale: Of the scores.

    Returns:
        [1, N, H, D_v], contiguous.

    """
    heads, tokens = query.shape[1:3]
    output = query.new_empty((1, tokens, heads, value.shape[3]))
    for begin, end in itertools.pairwise(offsets.tolist()):
        q, k, v = (t.narrow(2, begin, end - begin) for t in (query, key, value))
        output[:, begin:end] = attend_causal(q, k, v, scale)
    return output


@attend_packed.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    _, heads, tokens, _ = query.shape
    return query.new_empty((1, tokens, heads, value.shape[3]))
