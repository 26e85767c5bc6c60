"""Projections of one input through up to three weights: ``ops.project``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...infra.launch import Launch, has_pdl
from ..ops import GATES, MAX_ROWS, result_dtype


@triton.jit
def _pick(pid, p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, BN: tl.constexpr):
    """Return which of three weights a program works on, and its place in it."""
    first, second = tl.cdiv(n0, BN), tl.cdiv(n1, BN)
    w, y, b, n, block = p0, y0, b0, n0, pid
    if pid >= first + second:
        w, y, b, n, block = p2, y2, b2, n2, pid - first - second
    elif pid >= first:
        w, y, b, n, block = p1, y1, b1, n1, pid - first
    return w, y, b, n, block


@triton.jit
def _gated(gate, up, GATED: tl.constexpr):
    """Return ``silu(gate) * up``, or with 2 for GATED ``gelu(gate) * up``, by its tanh."""
    asked = gate
    if GATED == 2:  # 1 + tanh(u) is 2 / (1 + exp(-2 u))
        asked = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    return gate / (1.0 + tl.exp(-asked)) * up


@triton.jit
def _project_row(
    x, norm, residual, p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, eps, offset,
    K: tl.constexpr, MANY: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One row: BN outputs a program, products summed in float32 registers."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w, y, b, n, block = p0, y0, b0, n0, tl.program_id(0)
    if MANY:
        w, y, b, n, block = _pick(
            tl.program_id(0), p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, BN
        )
    rows = block * BN + tl.arange(0, BN)
    cols = tl.arange(0, BK)
    inside = rows < n
    at = rows.to(tl.int64)[:, None] * K + cols[None, :]
    total = tl.zeros([BN, BK], tl.float32)
    other = tl.zeros([BN, BK], tl.float32)
    squares = tl.zeros([BK], tl.float32)
    mask = inside[:, None] & (cols[None, :] < K)
    tile = tl.load(w + at, mask=mask, other=0.0, eviction_policy="evict_first")
    if GATED:
        gate = tl.load(p1 + at, mask=mask, other=0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()
    for k in tl.static_range(0, K, BK):
        value = tl.load(x + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            factor = tl.load(norm + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
            value *= factor + offset
        if k > 0:
            mask = inside[:, None] & (k + cols[None, :] < K)
            tile = tl.load(w + at + k, mask=mask, other=0.0, eviction_policy="evict_first")
            if GATED:
                gate = tl.load(p1 + at + k, mask=mask, other=0.0, eviction_policy="evict_first")
        total += tile.to(tl.float32) * value[None, :]
        if GATED:
            other += gate.to(tl.float32) * value[None, :]
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares) / K + eps)
    result = tl.sum(total, 1) * scale
    if BIAS:
        result += tl.load(b + rows, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        second = tl.sum(other, 1) * scale
        if BIAS:
            second += tl.load(b1 + rows, mask=inside, other=0.0).to(tl.float32)
        result = _gated(result, second, GATED)
    if RESIDUAL:
        result += tl.load(residual + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + rows, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _prefetch(w, outs, n, K: tl.constexpr, COLS: tl.constexpr):
    """Have the first columns of some outputs' weights read into L2."""
    LINE: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
    cols = tl.arange(0, COLS // LINE) * LINE
    rows = tl.minimum(outs, n - 1).to(tl.int64)
    at = (w + rows[:, None] * K + tl.minimum(cols, K - 1)[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows_in"])
def _project_rows(
    x, norm, residual, p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, eps, offset,
    rows_in,
    K: tl.constexpr, MANY: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr, M: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Up to M rows: BN outputs of each a program, on the matrix units."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w, y, b, n, block = p0, y0, b0, n0, tl.program_id(0)
    if MANY:
        w, y, b, n, block = _pick(
            tl.program_id(0), p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, BN
        )
    outs = block * BN + tl.arange(0, BN)
    if PDL:
        _prefetch(w, outs, n, K, 2 * BK)
        if GATED:
            _prefetch(p1, outs, n, K, 2 * BK)
        tl.extra.cuda.gdc_wait()
    cols = tl.arange(0, BK)
    row = tl.arange(0, M)
    inside = outs < n
    at = outs.to(tl.int64)[:, None] * K + cols[None, :]
    total = tl.zeros([M, BN], tl.float32)
    other = tl.zeros([M, BN], tl.float32)
    squares = tl.zeros([M], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        there = k + cols < K
        value = tl.load(
            x + row[:, None] * K + k + cols[None, :],
            mask=(row < rows_in)[:, None] & there[None, :],
            other=0.0,
        )
        mask = inside[:, None] & there[None, :]
        tile = tl.load(w + at + k, mask=mask, other=0.0, eviction_policy="evict_first")
        if NORM:
            wide = value.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            weight = tl.load(norm + k + cols, mask=there, other=0.0).to(tl.float32) + offset
            value = (wide * weight[None, :]).to(tile.dtype)
        total = tl.dot(value, tl.trans(tile), total)
        if GATED:
            gate = tl.load(p1 + at + k, mask=mask, other=0.0, eviction_policy="evict_first")
            other = tl.dot(value, tl.trans(gate), other)
    if NORM:
        scale = tl.rsqrt(squares / K + eps)[:, None]
        total *= scale
        other *= scale
    if BIAS:
        total += tl.load(b + outs, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if BIAS:
            other += tl.load(b1 + outs, mask=inside, other=0.0).to(tl.float32)[None, :]
        total = _gated(total, other, GATED)
    place = row[:, None] * n + outs[None, :]
    mask = (row < rows_in)[:, None] & inside[None, :]
    if RESIDUAL:
        total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)


def project(*inputs: Any) -> list[torch.Tensor]:
    """Compute :func:`ops.project`, which describes the inputs."""
    return projection(*inputs).run()


def projection(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    norm: torch.Tensor | None,
    eps: float,
    activation: str,
    residual: torch.Tensor | None,
    offset: float = 0.0,
) -> Launch:
    """Return the launch of :func:`ops.project`, of at most three weights."""
    width = x.shape[-1]
    rows = x.numel() // width
    kept = weights[:1] if activation else weights
    dtype = result_dtype(weights, residual)
    outputs = [x.new_empty((*x.shape[:-1], w.shape[0]), dtype=dtype) for w in kept]
    gated = bool(activation)
    sizes = [w.shape[0] for w in weights] + [0] * (3 - len(weights))
    if rows == 1:
        bn, bk, warps, stages = _row_blocks(width, sum(sizes), gated)
    else:
        bn, bk, warps, stages = _rows_blocks(width, sum(sizes), gated, rows)
    programs = sum(triton.cdiv(w.shape[0], bn) for w in kept)
    arguments = (
        x.contiguous(),
        norm if norm is not None else x,
        residual.contiguous() if residual is not None else x,
        *_padded(weights),
        *_padded(outputs),
        *_padded(biases or weights),
        *sizes,
        eps,
        offset,
    )
    pdl = has_pdl(x.device)
    flags = {
        "K": width,
        "MANY": len(outputs) > 1,
        "NORM": norm is not None,
        "GATED": GATES[activation],
        "BIAS": bool(biases),
        "RESIDUAL": residual is not None,
        "PDL": pdl,
        "BN": bn,
        "BK": bk,
        "num_warps": warps,
        **({"launch_pdl": True} if pdl else {}),
    }
    if rows == 1:
        return Launch(_project_row, (programs,), arguments, flags, outputs, wants_l1=True)
    flags |= {"M": 16 if rows <= 16 else MAX_ROWS, "STAGES": stages}
    return Launch(_project_rows, (programs,), (*arguments, rows), flags, outputs)


def _padded(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return three tensors; the kernel does not touch those that are repeated."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def _row_blocks(width: int, outputs: int, gated: bool) -> tuple[int, int, int, int]:
    """Return outputs a program, columns at a time, warps and stages, for one row.

    They were chosen on an H200.

    """
    few = outputs <= 4608
    if gated:
        bn, bk, warps = 2, 1024, 4
    elif width > 8192 or (few and width > 4096):
        bn, bk, warps = 2, 2048, 4
    elif outputs > 32768:
        bn, bk, warps = 4, 2048, 8
    elif outputs <= 1024:
        bn, bk, warps = 4, 2048, 2 if width > 1024 else 1
    elif width < 4096:
        bn, bk, warps = 4, 1024, 2 if outputs > 8192 and width % 1024 else 4
    elif few:
        bn, bk, warps = 2, 2048, 8
    else:
        bn, bk, warps = 4, 512, 2
    return bn, min(bk, triton.next_power_of_2(width)), warps, 1


def _rows_blocks(width: int, outputs: int, gated: bool, rows: int) -> tuple[int, int, int, int]:
    """Return the same for several rows."""
    many = rows > 16
    if gated:
        if many:
            return 64, 128, 4, 3
        return (32, 64, 4, 6) if width <= 1024 and outputs <= 4096 else (32, 256, 4, 3)
    if outputs > 32768:
        return 32, 256, 2, 3
    if outputs > 4096:
        return (16, 256, 2, 4) if many else (16, 512, 2, 3)
    if many:
        return 32, 512, 4, 3
    if outputs <= 1024:
        return (16, 128, 2, 6) if width <= 1024 else (16, 512, 2, 3)
    if outputs <= 2048 and width >= 4096:
        return 16, 512, 2, 6
    return 32, 512, 2 if width <= 2048 else 4, 4
