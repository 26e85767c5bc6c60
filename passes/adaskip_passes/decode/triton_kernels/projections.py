"""Projections of one input through up to three weights: ``projection_ops.project``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...infra.launch import Launch, has_pdl
from ..ops import MAX_ROWS
from ..projection_ops import ACTIVATIONS, result_dtype
from .norms import moments
from .projection_blocks import row_blocks, rows_blocks


@triton.jit
def _pick(pid, p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, f0, f1, f2, BN: tl.constexpr):
    """Return which of three weights a program works on, and its place in it."""
    first, second = tl.cdiv(n0, BN), tl.cdiv(n1, BN)
    w, y, b, n, f, block = p0, y0, b0, n0, f0, pid
    if pid >= first + second:
        w, y, b, n, f, block = p2, y2, b2, n2, f2, pid - first - second
    elif pid >= first:
        w, y, b, n, f, block = p1, y1, b1, n1, f1, pid - first
    return w, y, b, n, f, block


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """Return an activation of x, by its number in ``projection_ops.ACTIVATIONS``."""
    if ACTIVATION == 3:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 4:
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == 5:
        x = tl.where(x < 0.0, 0.0, x * x)
    else:
        asked = x
        if ACTIVATION == 2:  # 1 + tanh(u) is 2 / (1 + exp(-2 u))
            asked = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        x = x / (1.0 + tl.exp(-asked))
    return x


@triton.jit
def _project_row(
    x, norm, shift, residual, p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, f0, f1, f2,
    eps, offset,
    K: tl.constexpr, MANY: tl.constexpr, NORM: tl.constexpr, CENTERED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
    RESIDUAL: tl.constexpr, PDL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One row: BN outputs a program, products summed in float32 registers."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w, y, b, n, f, block = p0, y0, b0, n0, f0, tl.program_id(0)
    if MANY:
        w, y, b, n, f, block = _pick(
            tl.program_id(0), p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, f0, f1, f2, BN
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
    if CENTERED:
        mean, deviation = moments(x, eps, K, BK)
    for k in tl.static_range(0, K, BK):
        value = tl.load(x + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
        if NORM:
            if CENTERED:
                value = (value - mean) * deviation
            else:
                squares += value * value
            by = tl.load(norm + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
            value *= by + offset
            if shift is not None:
                value += tl.load(shift + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
        if k > 0:
            mask = inside[:, None] & (k + cols[None, :] < K)
            tile = tl.load(w + at + k, mask=mask, other=0.0, eviction_policy="evict_first")
            if GATED:
                gate = tl.load(p1 + at + k, mask=mask, other=0.0, eviction_policy="evict_first")
        total += tile.to(tl.float32) * value[None, :]
        if GATED:
            other += gate.to(tl.float32) * value[None, :]
    scale = 1.0
    if NORM and not CENTERED:
        scale = tl.rsqrt(tl.sum(squares) / K + eps)
    result = tl.sum(total, 1) * scale
    if SCALED:
        result *= f
    if BIAS:
        result += tl.load(b + rows, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION:
        result = _activated(result, ACTIVATION)
    if GATED:
        second = tl.sum(other, 1) * scale
        if SCALED:
            second *= f1
        if BIAS:
            second += tl.load(b1 + rows, mask=inside, other=0.0).to(tl.float32)
        result *= second
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
    x, norm, residual, p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, f0, f1, f2, eps, offset,
    rows_in,
    K: tl.constexpr, MANY: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, RESIDUAL: tl.constexpr,
    PDL: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Up to M rows: BN outputs of each a program, on the matrix units."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w, y, b, n, f, block = p0, y0, b0, n0, f0, tl.program_id(0)
    if MANY:
        w, y, b, n, f, block = _pick(
            tl.program_id(0), p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, f0, f1, f2, BN
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
    if SCALED:
        total *= f
        other *= f1
    if BIAS:
        total += tl.load(b + outs, mask=inside, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION:
        total = _activated(total, ACTIVATION)
    if GATED:
        if BIAS:
            other += tl.load(b1 + outs, mask=inside, other=0.0).to(tl.float32)[None, :]
        total *= other
    place = row[:, None] * n + outs[None, :]
    mask = (row < rows_in)[:, None] & inside[None, :]
    if RESIDUAL:
        total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)


def project(*inputs: Any) -> list[torch.Tensor]:
    """Compute :func:`projection_ops.project`, which describes the inputs."""
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
    shift: torch.Tensor | None = None,
    centered: bool = False,
    factors: list[float] | None = None,
    wide: bool = False,
) -> Launch:
    """Return the launch of :func:`projection_ops.project`, of at most three weights."""
    width = x.shape[-1]
    rows = x.numel() // width
    assert rows == 1 or not centered, "a layer norm of several rows is an operator of its own"
    assert centered or shift is None, "only a layer norm is shifted"
    kept = weights[:1] if activation else weights
    dtype = result_dtype(weights, residual, wide)
    outputs = [x.new_empty((*x.shape[:-1], w.shape[0]), dtype=dtype) for w in kept]
    gated = bool(activation) and len(weights) > 1
    sizes = [w.shape[0] for w in weights] + [0] * (3 - len(weights))
    if rows == 1:
        bn, bk, warps, stages = row_blocks(width, sum(sizes), gated)
    else:
        bn, bk, warps, stages = rows_blocks(width, sum(sizes), gated, rows)
    programs = sum(triton.cdiv(w.shape[0], bn) for w in kept)
    pdl = has_pdl(x.device)
    tensors = _padded(weights), _padded(outputs), _padded(biases or weights)
    numbers = *sizes, *[*(factors or ()), 1.0, 1.0, 1.0][:3], eps, offset
    arguments = (*(t for three in tensors for t in three), *numbers)
    first = x.contiguous(), norm if norm is not None else x
    added = residual.contiguous() if residual is not None else x
    flags = {
        "K": width,
        "MANY": len(outputs) > 1,
        "NORM": norm is not None,
        "ACTIVATION": ACTIVATIONS[activation],
        "GATED": gated,
        "BIAS": bool(biases),
        "SCALED": factors is not None,
        "RESIDUAL": residual is not None,
        "PDL": pdl,
        "BN": bn,
        "BK": bk,
        "num_warps": warps,
        **({"launch_pdl": True} if pdl else {}),
    }
    if rows == 1:
        flags["CENTERED"] = centered
        arguments = (*first, shift, added, *arguments)
        return Launch(_project_row, (programs,), arguments, flags, outputs, wants_l1=True)
    flags |= {"M": 16 if rows <= 16 else MAX_ROWS, "STAGES": stages}
    return Launch(_project_rows, (programs,), (*first, added, *arguments, rows), flags, outputs)


def _padded(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return three tensors; the kernel does not touch those that are repeated."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]
