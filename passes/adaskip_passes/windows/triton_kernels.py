"""Copies of some heads, where they lie between others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..infra.launch import on_device


@triton.jit(do_not_specialize=["T"])
def _copy(
    source, target, places, others, H, T, s_b, s_h, s_t, t_b, t_h, t_t,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head a program."""
    blocks = tl.cdiv(T, ROWS)
    of_all = tl.program_id(0) // blocks
    b, i = (of_all // H).to(tl.int64), of_all % H
    here, there = tl.load(places + i).to(tl.int64), tl.load(others + i).to(tl.int64)
    t = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, DP)
    mask = (t < T)[:, None] & (d < D)[None, :]
    value = tl.load(source + b * s_b + here * s_h + t[:, None] * s_t + d[None, :], mask=mask)
    tl.store(target + b * t_b + there * t_h + t[:, None] * t_t + d[None, :], value, mask=mask)


def take_heads(source: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """Return some heads of a tensor [B, H, T, D], whose numbers lie side by side: [B, h, T, D]."""
    batch, _, tokens, dim = source.shape
    taken = source.new_empty((batch, tokens, len(heads), dim)).transpose(1, 2)
    _copy_heads(source, taken, heads, range(len(heads)))
    return taken


def put_heads(mixed: torch.Tensor, output: torch.Tensor, heads: Sequence[int]) -> None:
    """Copy [B, T, h, D] to those `heads` of `output`, [B, T, H, D]."""
    _copy_heads(mixed.transpose(1, 2), output.transpose(1, 2), range(len(heads)), heads)


def _copy_heads(
    source: torch.Tensor, target: torch.Tensor, places: Sequence[int], others: Sequence[int]
) -> None:
    """Copy heads of [B, H, T, D] to heads of [B, H', T, D], one after another."""
    batch, _, tokens, dim = source.shape
    rows, count = 64, len(places)
    here, there = (on_device(tuple(n), source.device, torch.int32) for n in (places, others))
    grid: Any = (triton.cdiv(tokens, rows) * batch * count,)
    _copy[grid](
        source, target, here, there, count, tokens, *source.stride()[:3], *target.stride()[:3],
        D=dim, DP=triton.next_power_of_2(dim), ROWS=rows,
    )  # fmt: skip
