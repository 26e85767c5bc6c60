"""The operators of :mod:`ops` on CUDA, by PyTorch's fused kernels and one in tiles.

On Hopper cuDNN's attention is nearly twice as fast as flash attention 2, but it makes a plan for
every new shape (:mod:`.cudnn_plans`), and its causal mask begins with the first key. With
plans, attention of a chunk is therefore computed in two parts: to what was stored before it,
without a mask, and to itself; the two are weighted by their masses. Without, heads of the usual
sizes run on :mod:`.triton_kernels.tiles`, which knows the matrix units of Hopper and needs no plan.

Flash attention takes values as wide as keys. Narrower ones (DeepSeek's, 128 beside 192) get zeros
there, which costs less than PyTorch's other kernels.
"""

from __future__ import annotations

import functools

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.functional import pad

from .._torch import cudnn_attention, flash_attention
from .cudnn_plans import CudnnPlans
from .ops import causal

_FEW_QUERIES = 128  # up to so many, flash attention splits the keys, and is as fast
_TILED = (128, 256)  # numbers of a head; measured on an H200
_HALF = (torch.float16, torch.bfloat16)
#: Seconds that an operation takes longer than on cuDNN, on an H200.
_LONGER_ON_FLASH, _LONGER_IN_TILES = 1.8e-15, 0.6e-15
_plans = CudnnPlans()


def _attend_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    past, narrower = key.shape[2] - query.shape[2], query.shape[3] - value.shape[3]
    more = None, 0.0, not past, query.shape[1] != key.shape[1]
    cudnn = can_use_cudnn_attention(SDPAParams(query, key, value, *more))
    as_wide = key if narrower > 0 else value  # in shape
    flash = can_use_flash_attention(SDPAParams(query, key, as_wide, *more))
    flash = flash and query.shape[3] % 8 == 0
    if flash and not (cudnn and _pays_for_a_plan(query, key, value, past)):
        if query.shape[2] > _FEW_QUERIES and knows_tiles(query, value):
            from .triton_kernels import tiles

            return tiles.attend_causal(query, key, value, scale)
        if narrower <= 0:
            return flash_attention(query, key, value, scale)
        output = flash_attention(query, key, pad(value, (0, narrower)), scale)
        return output[..., : value.shape[3]].contiguous()
    if past and cudnn:
        return _in_two_parts(query, key, value, past, scale)
    return causal(query, key, value, scale)


torch.library.impl("adaskip::attend_causal", "cuda", _attend_causal)


def knows_tiles(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether attention in tiles is faster than flash attention for many such queries."""
    dim = query.shape[3]
    return (
        dim == value.shape[3]
        and dim in _TILED
        and query.dtype in _HALF
        and query.is_cuda
        and _is_hopper(query.device)
    )


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _pays_for_a_plan(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: int
) -> bool:
    """Return whether this call runs on cuDNN; it is counted."""
    batch, heads, tokens, dim = query.shape
    if past and tokens <= _FEW_QUERIES:
        return False
    layouts = (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride())
    shape = *layouts, query.dtype, query.device
    operations = 2.0 * batch * heads * (dim + value.shape[3]) * tokens * (past + tokens / 2)
    longer = _LONGER_IN_TILES if knows_tiles(query, value) else _LONGER_ON_FLASH
    return _plans.pay(shape, longer * operations, 2 if past else 1)


def _in_two_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: int, scale: float
) -> torch.Tensor:
    from .triton_kernels.merge import merge

    tokens = query.shape[2]
    before = cudnn_attention(
        query, key.narrow(2, 0, past), value.narrow(2, 0, past), scale, causal=False
    )
    itself = cudnn_attention(
        query, key.narrow(2, past, tokens), value.narrow(2, past, tokens), scale, causal=True
    )
    return merge(*before, *itself)
