"""The operators of :mod:`ops` on CUDA: a kernel for heads with windows, cuDNN or flash for others.

Heads that see everything run as causal attention does, which is faster there but knows neither
soft caps nor sink scores; where they lie between others they are copied. The kernel reads and
writes heads where they are.
"""

from __future__ import annotations

import torch

from ..attention.ops import attend_causal
from . import ops as ops  # defines its operators
from .blocks import alike, by_window

_HALF = (torch.float16, torch.bfloat16)
_WIDEST = 256  # numbers of a head


def _attend_windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
    softcap: float = 0.0,
    sink_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    if query.dtype not in _HALF or max(query.shape[3], value.shape[3]) > _WIDEST:
        return by_window(query, key, value, windows, own, scale, softcap, sink_scores)
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    stored, kv_heads = key.shape[2], key.shape[1]
    groups = alike(windows, stored, own, kv_heads)
    plain = not softcap and sink_scores is None
    if plain and len(groups) == 1 and groups[0][1][1] >= stored:
        return attend_causal(query, key, value, scale)
    from ..attention.triton_kernels.tiles import Seeing, attend

    batch, heads, tokens, _ = query.shape
    output = query.new_empty((batch, tokens, heads, value.shape[3]))
    for chosen, (sinks, seen) in groups:
        if plain and seen >= stored:
            _see_everything(query, key, value, output, tuple(chosen), scale)
        else:
            seeing = Seeing(sinks, seen, scale, softcap, sink_scores)
            attend(query, key, value, output, chosen, seeing)
    return output


torch.library.impl("adaskip::attend_windowed", "cuda", _attend_windowed)


def _see_everything(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    chosen: tuple[int, ...],
    scale: float,
) -> None:
    """Write causal attention of some K/V heads into their places of `output`."""
    from .triton_kernels import put_heads, take_heads

    group, first = query.shape[1] // key.shape[1], chosen[0]
    queries = tuple(h * group + i for h in chosen for i in range(group))
    if chosen == tuple(range(first, first + len(chosen))):
        q = query.narrow(1, first * group, len(queries))
        k, v = (t.narrow(1, first, len(chosen)) for t in (key, value))
    else:
        q, k, v = take_heads(query, queries), take_heads(key, chosen), take_heads(value, chosen)
    put_heads(attend_causal(q, k, v, scale), output, queries)
