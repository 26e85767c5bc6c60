"""Attention of one query per row over the filled part of a cache: ``ops.attend``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Launch, has_pdl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _combine(
    output, partial, weight, head, b, h, d,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    GB: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Write the result of a K/V head: the shares of the cache, weighted by their masses."""
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
        _combine(output, partial, weight, head, b, h, d, H, G, D, DP, GP, GB, SPLITS)
        tl.store(counters + head, 0)


def attend(*inputs: Any) -> torch.Tensor:
    """Compute :func:`ops.attend`, which describes the inputs; `counters` come last."""
    return attention(*inputs).run()[0]


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    filled: torch.Tensor,
    scale: float,
    counters: torch.Tensor,
) -> Launch:
    """Return the launch of :func:`ops.attend`, which describes the other inputs.

    Args:
        query: The queries.
        keys: The keys.
        values: The values.
        filled: How many of them count.
        scale: Of the scores.
        counters: int32, one for each row and K/V head; they are zero before and after.

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
    pdl = has_pdl(query.device)
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


def _shares(heads: int) -> tuple[int, int, int]:
    """Return the shares (a power of two) of the cache, the keys at a time, and the stages.

    With few heads, small programs, two on a multiprocessor, that leave room for the next kernel's
    to begin; with many, fewer and larger ones.

    Args:
        heads: K/V heads of all rows together.

    """
    programs, block, stages = (256, 64, 2) if heads <= 32 else (128, 128, 3)
    return max(1, 1 << max(0, (programs // heads).bit_length() - 1)), block, stages
