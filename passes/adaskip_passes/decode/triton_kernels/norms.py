"""Norms of a few rows: ``projection_ops.normalize``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...infra.launch import Launch, has_pdl


@triton.jit
def _normalize(
    x, weight, shift, y, eps, offset, K: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr,
    CENTERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Normalize a row a program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    cols = tl.arange(0, KP)
    inside = cols < K
    factor = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)  # nobody writes it
    if shift is not None:
        more = tl.load(shift + cols, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * K + cols
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        value = tl.where(inside, value - tl.sum(value) / K, 0.0)
    scale = tl.rsqrt(tl.sum(value * value) / K + eps)
    value *= scale
    if not WIDE:
        value = value.to(y.dtype.element_ty).to(tl.float32)
    result = (factor + offset) * value
    if shift is not None:
        result += more
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def moments(x, eps, K: tl.constexpr, BK: tl.constexpr):
    """Return the mean of a row, and the inverse of its standard deviation.

    It is read twice: differences from the mean are squared, which loses nothing where the mean is
    large.
    """
    cols = tl.arange(0, BK)
    total = tl.zeros([BK], tl.float32)
    for k in tl.static_range(0, K, BK):
        total += tl.load(x + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
    mean = tl.sum(total) / K
    squares = tl.zeros([BK], tl.float32)
    for k in tl.static_range(0, K, BK):
        value = tl.load(x + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
        value = tl.where(k + cols < K, value - mean, 0.0)
        squares += value * value
    return mean, tl.rsqrt(tl.sum(squares) / K + eps)


def normalize(*inputs: Any) -> torch.Tensor:
    """Compute :func:`projection_ops.normalize`, which describes the inputs."""
    return normalization(*inputs).run()[0]


def normalization(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    shift: torch.Tensor | None = None,
    centered: bool = False,
) -> Launch:
    """Return the launch of :func:`projection_ops.normalize`."""
    width = x.shape[-1]
    y = x.new_empty(x.shape, dtype=weight.dtype)
    pdl = has_pdl(x.device)
    padded = triton.next_power_of_2(width)
    flags = {
        **{
            "K": width,
            "KP": padded,
            "WIDE": offset != 0.0 or centered or shift is not None,
            "CENTERED": centered,
            "PDL": pdl,
            "num_warps": max(1, min(16, padded // 512)),
        },
        **({"launch_pdl": True} if pdl else {}),
    }
    arguments = (x.contiguous(), weight, shift, y, eps, offset)
    return Launch(_normalize, (x.numel() // width,), arguments, flags, [y])
