"""How keys and values are stored: in how many bits, and how much of a prompt.

Numbers are rounded as a store would round them and scaled back at once, so that an eager model
reads what it would read from the store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

GROUP = 32  # tokens
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SCALE_BYTES = 4  # float32


@dataclass(frozen=True)
class Storage:
    """What a cache keeps of keys and values.

    Attributes:
        name: In tables.
        dtype: Of a stored number: int8 and float8_e4m3fn have scales, for the absolute maximum of
            each token and head; bfloat16 has none.
        by_channel: Keys have a scale for each channel and `GROUP` tokens instead, since a few
            channels of keys are far larger than the others (KIVI, arXiv 2402.02750, which keeps the
            last group as it is until it is full; here it is rounded like the others).
        share: Of a prompt's tokens that are kept at its end, in heads that see everything.
        pooled: Neighbours over which the scores are averaged that say which are kept. SnapKV's code
            takes 5; tokens of a number are attended to one after another, as it is written, so that
            more of them have to be kept together.
    """

    name: str
    dtype: torch.dtype = torch.bfloat16
    by_channel: bool = False
    share: float = 1.0
    pooled: int = 5

    def read(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [B, H, S, D] as they are read from the store."""
        largest = keys.abs().amax(-1, True)
        if self.by_channel:
            tokens = keys.shape[2]
            groups = pad(keys.abs(), (0, 0, 0, -tokens % GROUP)).unflatten(2, (-1, GROUP))
            largest = groups.amax(3).repeat_interleave(GROUP, 2)[:, :, :tokens]
        return self._rounded(keys, largest), self._rounded(values, values.abs().amax(-1, True))

    def _rounded(self, numbers: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        if self.dtype not in _LARGEST:
            return numbers.to(self.dtype).to(numbers.dtype)
        limit = _LARGEST[self.dtype]
        scale = (largest.float() / limit).clamp_min(torch.finfo(torch.float32).tiny)
        units = (numbers.float() / scale).clamp(-limit, limit)
        stored = units.round() if self.dtype == torch.int8 else units  # (a cast to int8 cuts off)
        return (stored.to(self.dtype).float() * scale).to(numbers.dtype)

    def kept(self, prompt: int) -> int:
        """Return how many of a prompt's tokens a head keeps that sees everything."""
        return round(self.share * prompt)

    def head_bytes(self, tokens: int, dim: int) -> int:
        """Return the bytes of `tokens` keys and values of `dim` numbers each, and their scales."""
        keys = dim * math.ceil(tokens / GROUP) if self.by_channel else tokens
        scales = keys + tokens if self.dtype in _LARGEST else 0
        return 2 * tokens * dim * self.dtype.itemsize + _SCALE_BYTES * scales


#: What SnapKV-like eviction keeps of a prompt.
KEPT = 0.5
_WIDE = 13

STORAGES = (
    Storage("bfloat16"),
    Storage("int8", torch.int8),
    Storage("int8, keys by channel", torch.int8, by_channel=True),
    Storage("fp8", torch.float8_e4m3fn),
    Storage("evicted", share=KEPT),
    Storage("evicted, wide", share=KEPT, pooled=_WIDE),
    Storage("evicted, wide, int8", torch.int8, by_channel=True, share=KEPT, pooled=_WIDE),
)
