"""Chosen experts of several tokens, on the matrix units.

A program works on some outputs of one expert, of all tokens, and stores those of the tokens that
chose it. There are programs for each pair of a token and an expert; only those of the first pair
with its expert have something to do, and the others end at once. So a weight is read once, and
nothing is sorted or counted beforehand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .expert_parts import gated, wait


@triton.jit
def _is_first(chosen, pair, expert, PAIRS: tl.constexpr, PADDED: tl.constexpr):
    """Return whether no pair before this one has its expert."""
    pairs = tl.arange(0, PADDED)
    every = tl.load(chosen + pairs, mask=pairs < PAIRS, other=-1)
    return tl.min(tl.where(every == expert, pairs, PADDED)) == pair


@triton.jit
def up_rows(
    x, chosen, w, bias, y, tokens, clamp, alpha,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr,
    PADDED: tl.constexpr, TRANSPOSED: tl.constexpr, INTERLEAVED: tl.constexpr,
    CLAMPED: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to M tokens: BN gated outputs of one expert a program."""
    wait(PDL)
    pair = tl.program_id(1)
    expert = tl.load(chosen + pair)
    if (expert < 0) | (expert >= E):
        return
    if not _is_first(chosen, pair, expert, PAIRS, PADDED):
        return
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    both = tl.program_id(0) * 2 * BN + tl.arange(0, 2 * BN)
    inside = outs < N
    row = tl.arange(0, M)
    cols = tl.arange(0, BK)
    w += expert * (2 * N * K)
    first, second = outs, outs + N
    if INTERLEAVED:
        first, second = 2 * outs, 2 * outs + 1
    gate = tl.zeros([M, BN], tl.float32)
    up = tl.zeros([M, BN], tl.float32)
    pairs = tl.zeros([M, 2 * BN], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        there = k + cols < K
        known = (row < tokens)[:, None] & there[None, :]
        value = tl.load(x + row[:, None] * K + k + cols[None, :], mask=known, other=0.0)
        if TRANSPOSED and INTERLEAVED:
            at = w + (k + cols)[:, None] * (2 * N) + both[None, :]
            mask = there[:, None] & (both < 2 * N)[None, :]
            tile = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
            pairs = tl.dot(value, tile, pairs, input_precision=PRECISION)
        elif TRANSPOSED:
            at = w + (k + cols)[:, None] * (2 * N) + outs[None, :]
            mask = there[:, None] & inside[None, :]
            tile = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
            gate = tl.dot(value, tile, gate, input_precision=PRECISION)
            tile = tl.load(at + N, mask=mask, other=0.0, eviction_policy="evict_first")
            up = tl.dot(value, tile, up, input_precision=PRECISION)
        else:
            at = w + k + cols[None, :]
            mask = inside[:, None] & there[None, :]
            tile = tl.load(
                at + first[:, None] * K, mask=mask, other=0.0, eviction_policy="evict_first"
            )
            gate = tl.dot(value, tl.trans(tile), gate, input_precision=PRECISION)
            tile = tl.load(
                at + second[:, None] * K, mask=mask, other=0.0, eviction_policy="evict_first"
            )
            up = tl.dot(value, tl.trans(tile), up, input_precision=PRECISION)
    if TRANSPOSED and INTERLEAVED:
        gate, up = tl.split(tl.reshape(pairs, [M, BN, 2]))
    if BIAS:
        bias += expert * (2 * N)
        gate += tl.load(bias + first, mask=inside, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + second, mask=inside, other=0.0).to(tl.float32)[None, :]
    result = gated(gate, up, clamp, alpha, CLAMPED).to(y.dtype.element_ty)
    _store_of(y, result, chosen, expert, tokens, outs, N, COUNT, M)


@triton.jit
def _store_of(
    y, result, chosen, expert, tokens, outs, N: tl.constexpr, COUNT: tl.constexpr, M: tl.constexpr
):
    """Store the outputs of the pairs that chose an expert."""
    row = tl.arange(0, M)
    for j in tl.static_range(COUNT):
        pair = row * COUNT + j
        mine = tl.load(chosen + pair, mask=row < tokens, other=-1) == expert
        mask = mine[:, None] & (outs < N)[None, :]
        tl.store(y + pair[:, None] * N + outs[None, :], result, mask=mask)


@triton.jit
def down_rows(
    y, chosen, w, parts, tokens,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr,
    PADDED: tl.constexpr, TRANSPOSED: tl.constexpr, PDL: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to M tokens: BN outputs of one expert a program, for each pair that chose it."""
    wait(PDL)
    pair = tl.program_id(1)
    expert = tl.load(chosen + pair)
    if (expert < 0) | (expert >= E):
        return
    if not _is_first(chosen, pair, expert, PAIRS, PADDED):
        return
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = outs < N
    row = tl.arange(0, M)
    cols = tl.arange(0, BK)
    w += expert * (N * K)
    source = tl.full([M], -1, tl.int32)
    for j in tl.static_range(COUNT):
        mine = tl.load(chosen + row * COUNT + j, mask=row < tokens, other=-1) == expert
        source = tl.where(mine, row * COUNT + j, source)
    total = tl.zeros([M, BN], tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        there = k + cols < K
        known = (source >= 0)[:, None] & there[None, :]
        value = tl.load(y + source[:, None] * K + k + cols[None, :], mask=known, other=0.0)
        if TRANSPOSED:
            at = w + (k + cols)[:, None] * N + outs[None, :]
            mask = there[:, None] & inside[None, :]
            tile = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
        else:
            at = w + outs[:, None] * K + k + cols[None, :]
            mask = inside[:, None] & there[None, :]
            tile = tl.trans(tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first"))
        total = tl.dot(value, tile, total, input_precision=PRECISION)
    _store_of(parts, total, chosen, expert, tokens, outs, N, COUNT, M)
