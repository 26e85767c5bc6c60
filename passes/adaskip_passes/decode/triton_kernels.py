"""Triton kernels for `ops`, on CUDA.

Both are bound by reading memory: every weight, key and value is read once, in 16-byte accesses,
and nothing intermediate is written. Kernels are launched with programmatic dependence (PDL): a
kernel starts while the one before it ends, loads its first weights, which nobody writes, and only
then waits for its input.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .ops import MAX_ROWS

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _pick(pid, p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, BN: tl.constexpr):
    """Which of three weights a program works on, and its place in it."""
    first, second = tl.cdiv(n0, BN), tl.cdiv(n1, BN)
    w, y, b, n, block = p0, y0, b0, n0, pid
    if pid >= first + second:
        w, y, b, n, block = p2, y2, b2, n2, pid - first - second
    elif pid >= first:
        w, y, b, n, block = p1, y1, b1, n1, pid - first
    return w, y, b, n, block


@triton.jit
def _project_row(
    x, norm, residual, p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, eps,
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
            value *= tl.load(norm + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
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
        result = result / (1.0 + tl.exp(-result)) * second
    if RESIDUAL:
        result += tl.load(residual + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + rows, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _project_rows(
    x, norm, residual, p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, eps, rows_in,
    K: tl.constexpr, MANY: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr, M: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Up to M rows: BN outputs of each a program, on the matrix units."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    w, y, b, n, block = p0, y0, b0, n0, tl.program_id(0)
    if MANY:
        w, y, b, n, block = _pick(
            tl.program_id(0), p0, p1, p2, y0, y1, y2, b0, b1, b2, n0, n1, n2, BN
        )
    outs = block * BN + tl.arange(0, BN)
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
            weight = tl.load(norm + k + cols, mask=there, other=0.0).to(tl.float32)
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
        total = total / (1.0 + tl.exp(-total)) * other
    place = row[:, None] * n + outs[None, :]
    mask = (row < rows_in)[:, None] & inside[None, :]
    if RESIDUAL:
        total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    query, keys, values, output, partial, weight, counters, filled, scale,
    stride_b, stride_h, stride_n,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    GB: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Flash decoding: a program a K/V head and share of the cache; the last of a head combines."""
    head, split = tl.program_id(0), tl.program_id(1)
    b, h = head // HK, head % HK
    G: tl.constexpr = H // HK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    length = tl.load(filled).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, BN), SPLITS) * BN
    low = split * share
    high = tl.minimum(low + share, length)
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    real = (g < G)[:, None] & (d < D)[None, :]
    q = tl.load(query + (b * H + h * G + g)[:, None] * D + d[None, :], mask=real, other=0.0)
    base = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    best = tl.full([GP], float("-inf"), tl.float32)
    mass = tl.zeros([GP], tl.float32)
    total = tl.zeros([GP, DP], tl.float32)
    for start in tl.range(low, high, BN, num_stages=STAGES):
        at = start + tl.arange(0, BN)
        there = (at < high)[:, None] & (d < D)[None, :]
        place = base + at.to(tl.int64)[:, None] * stride_n + d[None, :]
        k = tl.load(keys + place, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
        scores = tl.where((at < high)[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(best - higher)
        v = tl.load(values + place, mask=there, other=0.0)
        total = tl.dot(shares.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        mass = mass * shrink + tl.sum(shares, 1)
        best = higher
    slot = (head * SPLITS + split) * GP + g
    tl.store(partial + slot[:, None] * DP + d[None, :], total, mask=real)
    tl.store(weight + slot * 2, best, mask=g < G)
    tl.store(weight + slot * 2 + 1, mass, mask=g < G)
    tl.debug_barrier()
    if tl.atomic_add(counters + head, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        tl.debug_barrier()
        s = tl.arange(0, SPLITS)
        for first in range(0, G, GB):  # so many query heads at a time as registers hold
            c = first + tl.arange(0, GB)
            slots = (head * SPLITS + s)[:, None] * GP + c[None, :]
            there = (c < G)[None, :] & (s >= 0)[:, None]
            bests = tl.load(weight + slots * 2, mask=there, other=0.0, cache_modifier=".cg")
            masses = tl.load(weight + slots * 2 + 1, mask=there, other=1.0, cache_modifier=".cg")
            parts = tl.load(
                partial + slots[:, :, None] * DP + d[None, None, :],
                mask=there[:, :, None] & (d < D)[None, None, :], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            factor = tl.exp2(bests - tl.max(bests, 0)[None, :])  # 0 for a share without keys
            result = tl.sum(parts * factor[:, :, None], 0) / tl.sum(masses * factor, 0)[:, None]
            tl.store(
                output + (b * H + h * G + c)[:, None] * D + d[None, :],
                result.to(output.dtype.element_ty),
                mask=(c < G)[:, None] & (d < D)[None, :],
            )
        tl.store(counters + head, 0)


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, and the tensors that it writes."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    flags: dict[str, Any]
    outputs: list[torch.Tensor]

    def run(self) -> list[torch.Tensor]:
        self.kernel[self.grid](*self.arguments, **self.flags)
        return self.outputs

    def compile(self, device: torch.device) -> None:
        """Compile for arguments like these, which may be fake; the next `run` finds it."""
        mocked = [_mock(a) for a in self.arguments]
        with torch.cuda.device(device):
            compiled = self.kernel.warmup(*mocked, grid=self.grid, **self.flags)
            _ = compiled.run  # loads it, and builds its launcher


def _mock(value: Any) -> Any:
    """A dtype stands for an aligned tensor, an example for a length."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value.node.hint if isinstance(value, torch.SymInt) else value


def project(*inputs: Any) -> list[torch.Tensor]:
    """See :func:`ops.project`."""
    return projection(*inputs).run()


def attend(*inputs: Any) -> torch.Tensor:
    """See :func:`ops.attend`."""
    return attention(*inputs).run()[0]


def projection(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    norm: torch.Tensor | None,
    eps: float,
    activation: str,
    residual: torch.Tensor | None,
) -> Launch:
    """The launch of :func:`ops.project`; at most three weights."""
    width = x.shape[-1]
    rows = x.numel() // width
    kept = weights[:1] if activation else weights
    outputs = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in kept]
    gated = bool(activation)
    sizes = [w.shape[0] for w in weights] + [0] * (3 - len(weights))
    if rows == 1:
        bn, bk, warps, stages = _row_blocks(width, sum(sizes), gated)
    else:
        bn, bk, warps, stages = _rows_blocks(gated)
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
    )
    pdl = _pdl(x.device)
    flags = {
        "K": width,
        "MANY": len(outputs) > 1,
        "NORM": norm is not None,
        "GATED": gated,
        "BIAS": bool(biases),
        "RESIDUAL": residual is not None,
        "PDL": pdl,
        "BN": bn,
        "BK": bk,
        "num_warps": warps,
        **({"launch_pdl": True} if pdl else {}),
    }
    if rows == 1:
        return Launch(_project_row, (programs,), arguments, flags, outputs)
    flags |= {"M": MAX_ROWS, "STAGES": stages}
    return Launch(_project_rows, (programs,), (*arguments, rows), flags, outputs)


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    filled: torch.Tensor,
    scale: float,
    counters: torch.Tensor,
) -> Launch:
    """The launch of :func:`ops.attend`.

    `counters`, int32, are zero before and after: one a row and K/V head.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads = keys.shape[1]
    output = query.new_empty((batch, tokens, heads, dim))
    padded = max(16, triton.next_power_of_2(dim))
    group = max(16, triton.next_power_of_2(heads // kv_heads))
    splits, block, stages = _shares(batch * kv_heads)
    slots = batch * kv_heads * splits * group
    partial = query.new_empty(slots * padded, dtype=torch.float32)
    weight = query.new_empty(slots * 2, dtype=torch.float32)
    pdl = _pdl(query.device)
    arguments = (
        query.contiguous(),
        keys,
        values,
        output,
        partial,
        weight,
        counters,
        filled,
        scale,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
    )
    flags = {
        "H": heads,
        "HK": kv_heads,
        "D": dim,
        "DP": padded,
        "GP": group,
        "GB": max(1, min(triton.next_power_of_2(heads // kv_heads), 16384 // (splits * padded))),
        "SPLITS": splits,
        "BN": max(16, min(block, 32768 // (padded * keys.element_size()))),
        "STAGES": stages,
        "PDL": pdl,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        **({"launch_pdl": True} if pdl else {}),
    }
    return Launch(_attend, (batch * kv_heads, splits), arguments, flags, [output])


def _padded(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Three of them; the kernel does not touch those that are repeated."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


def _row_blocks(width: int, outputs: int, gated: bool) -> tuple[int, int, int, int]:
    """Outputs a program, columns at a time, warps and stages, for one row; chosen on an H200."""
    if gated:
        bn, bk, warps = 2, 1024, 4
    elif width > 8192:
        bn, bk, warps = 2, 2048, 4
    elif outputs > 32768:
        bn, bk, warps = 4, 2048, 8
    else:
        bn, bk, warps = 4, 512, 2
    return bn, min(bk, triton.next_power_of_2(width)), warps, 1


def _rows_blocks(gated: bool) -> tuple[int, int, int, int]:
    """Likewise for several rows."""
    return (32, 256, 4, 3) if gated else (16, 512, 2, 3)


def _shares(heads: int) -> tuple[int, int, int]:
    """Into how many shares the cache is cut (a power of two), keys at a time, and stages.

    With few heads, small programs, two on a multiprocessor, that leave room for the next kernel's
    to begin; with many, fewer and larger ones.
    """
    programs, block, stages = (256, 64, 2) if heads <= 32 else (128, 128, 3)
    return max(1, 1 << max(0, (programs // heads).bit_length() - 1)), block, stages


@functools.cache
def _pdl(device: torch.device) -> bool:
    """Whether the device knows programmatic dependent launch (compute capability 9)."""
    return torch.cuda.get_device_capability(device)[0] >= 9
