"""Chosen experts of one token: matrix-vector products of their weights, where they are stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .expert_parts import gated, prefetch, wait


@triton.jit
def up_row(
    x, chosen, w, bias, y, clamp, alpha,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr, CLAMPED: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One token: BN gated outputs of one of its experts a program."""
    wait(PDL)
    pair = tl.program_id(1)
    expert = tl.load(chosen + pair)
    if (expert < 0) | (expert >= E):
        return
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BK)
    inside = outs < N
    w += expert * (2 * N * K)
    first, second = outs, outs + N
    if INTERLEAVED:
        first, second = 2 * outs, 2 * outs + 1
    if TRANSPOSED and INTERLEAVED:
        both = tl.program_id(0) * 2 * BN + tl.arange(0, 2 * BN)
        pairs = tl.zeros([BK, 2 * BN], tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            value = tl.load(x + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
            mask = (k + cols < K)[:, None] & (both < 2 * N)[None, :]
            at = (k + cols)[:, None] * (2 * N) + both[None, :]
            tile = tl.load(w + at, mask=mask, other=0.0, eviction_policy="evict_first")
            pairs += tile.to(tl.float32) * value[:, None]
        gate, up = tl.split(tl.reshape(tl.sum(pairs, 0), [BN, 2]))
    elif TRANSPOSED:
        gates = tl.zeros([BK, BN], tl.float32)
        ups = tl.zeros([BK, BN], tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            value = tl.load(x + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
            mask = (k + cols < K)[:, None] & inside[None, :]
            at = (k + cols)[:, None] * (2 * N) + outs[None, :]
            tile = tl.load(w + at, mask=mask, other=0.0, eviction_policy="evict_first")
            gates += tile.to(tl.float32) * value[:, None]
            tile = tl.load(w + at + N, mask=mask, other=0.0, eviction_policy="evict_first")
            ups += tile.to(tl.float32) * value[:, None]
        gate, up = tl.sum(gates, 0), tl.sum(ups, 0)
    else:
        gates = tl.zeros([BN, BK], tl.float32)
        ups = tl.zeros([BN, BK], tl.float32)
        for k in tl.static_range(0, K, BK):
            value = tl.load(x + k + cols, mask=k + cols < K, other=0.0).to(tl.float32)
            mask = inside[:, None] & (k + cols < K)[None, :]
            at = w + k + cols[None, :]
            tile = tl.load(
                at + first[:, None] * K, mask=mask, other=0.0, eviction_policy="evict_first"
            )
            gates += tile.to(tl.float32) * value[None, :]
            tile = tl.load(
                at + second[:, None] * K, mask=mask, other=0.0, eviction_policy="evict_first"
            )
            ups += tile.to(tl.float32) * value[None, :]
        gate, up = tl.sum(gates, 1), tl.sum(ups, 1)
    if BIAS:
        bias += expert * (2 * N)
        gate += tl.load(bias + first, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(bias + second, mask=inside, other=0.0).to(tl.float32)
    result = gated(gate, up, clamp, alpha, CLAMPED)
    tl.store(y + pair * N + outs, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def down_row(
    y, chosen, shares, w, bias, residual, out,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, COUNT: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One token, outputs first: BN outputs a program, summed over all of its experts."""
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BK)
    inside = outs < N
    at = outs[:, None] * K + cols[None, :]
    expert = tl.load(chosen)
    known = inside[:, None] & (cols < K)[None, :] & (expert >= 0) & (expert < E)
    tile = tl.load(w + expert * (N * K) + at, mask=known, other=0.0, eviction_policy="evict_first")
    wait(PDL)
    total = tl.zeros([BN, BK], tl.float32)
    biases = tl.zeros([BN], tl.float32)
    for j in tl.static_range(COUNT):
        expert = tl.load(chosen + j)
        there = (expert >= 0) & (expert < E)
        share = tl.load(shares + j).to(tl.float32)
        for k in tl.static_range(0, K, BK):
            value = tl.load(y + j * K + k + cols, mask=(k + cols < K) & there, other=0.0)
            if j > 0 or k > 0:
                known = inside[:, None] & (k + cols < K)[None, :] & there
                tile = tl.load(
                    w + expert * (N * K) + at + k,
                    mask=known, other=0.0, eviction_policy="evict_first",
                )  # fmt: skip
            total += tile.to(tl.float32) * (value.to(tl.float32) * share)[None, :]
        if BIAS:
            one = tl.load(bias + expert * N + outs, mask=inside & there, other=0.0)
            biases += one.to(tl.float32) * share
    result = tl.sum(total, 1) + biases
    if RESIDUAL:
        result += tl.load(residual + outs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + outs, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def down_row_transposed(
    y, chosen, w, parts,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One token, outputs last: BN outputs of one expert a program, of a part of its inputs."""
    SPAN: tl.constexpr = (K + SPLITS - 1) // SPLITS
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    pair = tl.program_id(1)
    begin = tl.program_id(2) * SPAN
    end = tl.minimum(begin + SPAN, K)
    cols = tl.arange(0, BK)
    expert = tl.load(chosen + pair)
    if (expert < 0) | (expert >= E):
        return
    w += expert * (N * K)
    if PDL:
        rows = tl.minimum(begin + tl.arange(0, 2 * BK), K - 1)
        prefetch(w + rows * N + tl.program_id(0) * BN)
    wait(PDL)
    total = tl.zeros([BK, BN], tl.float32)
    y += pair * K
    for k in tl.range(0, SPAN, BK, num_stages=STAGES):
        known = begin + k + cols < end
        value = tl.load(y + begin + k + cols, mask=known, other=0.0).to(tl.float32)
        mask = known[:, None] & (outs < N)[None, :]
        at = (begin + k + cols)[:, None] * N + outs[None, :]
        tile = tl.load(w + at, mask=mask, other=0.0, eviction_policy="evict_first")
        total += tile.to(tl.float32) * value[:, None]
    place = (pair * SPLITS + tl.program_id(2)) * N + outs
    tl.store(parts + place, tl.sum(total, 0), mask=outs < N)
