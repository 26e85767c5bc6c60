"""The operators of :mod:`ops` on CUDA: flash attention for the last keys, and a kernel for sinks.

Flash attention 2 (Dao, "FlashAttention-2") leaves out blocks of keys before a window. The first
keys are few: a kernel computes attention to them and puts the two together by their masses.
"""

from __future__ import annotations

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from .._torch import flash_attention_to_last
from .ops import attend_windowed, by_window, in_blocks

_MOST_SINKS = 64  # of one tile


@attend_windowed.register_kernel("cuda")
def _attend_windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
) -> torch.Tensor:
    return by_window(query, key, value, windows, own, scale, _to_last_and_first)


def _to_last_and_first(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: int,
    seen: int,
    scale: float,
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    params = SDPAParams(query, key, value, None, 0.0, query.shape[2] == key.shape[2], grouped)
    dims = query.shape[3], value.shape[3]
    fits = dims[0] == dims[1] and dims[0] % 8 == 0 and sinks <= _MOST_SINKS
    if not (fits and can_use_flash_attention(params)):
        return in_blocks(query, key, value, sinks, seen, scale)
    output, masses = flash_attention_to_last(query, key, value, scale, seen)
    if sinks and key.shape[2] > seen:
        from .triton_kernels import add_sinks

        add_sinks(query, key, value, output, masses, sinks, seen, scale)
    return output
