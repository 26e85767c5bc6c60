"""Two parts of one attention, put together."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _merge(
    first, second, first_mass, second_mass, output, H, T,
    first_b, first_h, first_t, second_b, second_h, second_t,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head a program; the masses are logarithms, [B, H, T]."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    real = t < T
    mask = real[:, None] & (d < D)[None, :]
    mass = tl.program_id(1).to(tl.int64) * T + t
    one = tl.load(first_mass + mass, mask=real, other=0.0)
    two = tl.load(second_mass + mass, mask=real, other=0.0)
    most = tl.maximum(one, two)
    one, two = tl.exp(one - most), tl.exp(two - most)
    a = tl.load(
        first + b.to(tl.int64) * first_b + h * first_h + t[:, None] * first_t + d[None, :],
        mask=mask, other=0.0,
    )  # fmt: skip
    c = tl.load(
        second + b.to(tl.int64) * second_b + h * second_h + t[:, None] * second_t + d[None, :],
        mask=mask, other=0.0,
    )  # fmt: skip
    whole = (a.to(tl.float32) * one[:, None] + c.to(tl.float32) * two[:, None]) / (one + two)[
        :, None
    ]
    place = ((b.to(tl.int64) * T + t) * H + h)[:, None] * D + d[None, :]
    tl.store(output + place, whole.to(output.dtype.element_ty), mask=mask)


def merge(
    first: torch.Tensor, first_mass: torch.Tensor, second: torch.Tensor, second_mass: torch.Tensor
) -> torch.Tensor:
    """Return the attention to two sets of keys, of the attention to each.

    Args:
        first: To the first set, [B, H, T, D].
        first_mass: Logarithm of the sum of its exponentiated scores, B * H * T numbers.
        second: To the second set.
        second_mass: Likewise.

    Returns:
        [B, T, H, D], contiguous.

    """
    batch, heads, tokens, dim = first.shape
    output = first.new_empty((batch, tokens, heads, dim))
    rows = 16
    grid: Any = (triton.cdiv(tokens, rows), batch * heads)
    _merge[grid](
        first, second, first_mass.contiguous(), second_mass.contiguous(), output, heads, tokens,
        first.stride(0), first.stride(1), first.stride(2),
        second.stride(0), second.stride(1), second.stride(2),
        D=dim, DP=triton.next_power_of_2(dim), ROWS=rows, num_warps=4,
    )  # fmt: skip
    return output
