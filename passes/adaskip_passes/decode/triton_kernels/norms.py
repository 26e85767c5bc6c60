"""RMS norm of a few rows: ``ops.normalize``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...infra.launch import Launch, has_pdl


@triton.jit
def _normalize(
    x, weight, y, eps, offset, K: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Normalize a row a program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    cols = tl.arange(0, KP)
    inside = cols < K
    factor = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)  # nobody writes it
    if PDL:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * K + cols
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / K + eps)
    value *= scale
    if not WIDE:
        value = value.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, ((factor + offset) * value).to(y.dtype.element_ty), mask=inside)


def normalize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """Compute :func:`ops.normalize`, which describes the inputs."""
    return normalization(x, weight, eps, offset).run()[0]


def normalization(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> Launch:
    """Return the launch of :func:`ops.normalize`."""
    width = x.shape[-1]
    y = x.new_empty(x.shape, dtype=weight.dtype)
    pdl = has_pdl(x.device)
    padded = triton.next_power_of_2(width)
    flags = {
        **{
            "K": width,
            "KP": padded,
            "WIDE": offset != 0.0,
            "PDL": pdl,
            "num_warps": max(1, min(16, padded // 512)),
        },
        **({"launch_pdl": True} if pdl else {}),
    }
    arguments = (x.contiguous(), weight, y, eps, offset)
    return Launch(_normalize, (x.numel() // width,), arguments, flags, [y])
