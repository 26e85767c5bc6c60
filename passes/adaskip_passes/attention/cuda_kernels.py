"""The operators of :mod:`ops` on CUDA, by PyTorch's fused kernels.

cuDNN's attention is nearly twice as fast as flash attention 2 on Hopper, but its causal mask
begins with the first key. Attention of a chunk is therefore computed in two parts: to what was
stored before it, without a mask, and to itself; the two are weighted by their masses.
"""

from __future__ import annotations

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from .._torch import cudnn_attention, flash_attention
from .ops import attend_causal, causal_by_mask

_FEW_QUERIES = 128  # up to so many, flash attention splits the keys, and is as fast


@attend_causal.register_kernel("cuda")
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    tokens = query.shape[2]
    past = key.shape[2] - tokens
    grouped = query.shape[1] != key.shape[1]
    params = SDPAParams(query, key, value, None, 0.0, False, grouped)
    if past and tokens > _FEW_QUERIES and can_use_cudnn_attention(params):
        return _in_two_parts(query, key, value, past, scale)
    if past and can_use_flash_attention(params) and query.shape[3] % 8 == 0:
        return flash_attention(query, key, value, scale)
    return causal_by_mask(query, key, value, scale)


def _in_two_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: int, scale: float
) -> torch.Tensor:
    from . import triton_kernels

    tokens = query.shape[2]
    before = cudnn_attention(
        query, key.narrow(2, 0, past), value.narrow(2, 0, past), scale, causal=False
    )
    itself = cudnn_attention(
        query, key.narrow(2, past, tokens), value.narrow(2, past, tokens), scale, causal=True
    )
    return triton_kernels.merge(*before, *itself)
