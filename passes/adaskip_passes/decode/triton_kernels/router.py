"""The largest of a token's scores, of all or of the best groups, as a router chooses experts."""

from __future__ import annotations

import triton
import triton.language as tl

from .expert_parts import wait


@triton.jit
def choose(
    scores, values, places,
    E: tl.constexpr, EP: tl.constexpr, COUNT: tl.constexpr, CP: tl.constexpr,
    SOFTMAX: tl.constexpr, AFTER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token a program. A score and its place are one number, so that one search finds both."""
    wait(PDL)
    token = tl.program_id(0)
    cols = tl.arange(0, EP)
    one = tl.load(scores + token * E + cols, mask=cols < E, other=float("-inf")).to(tl.float32)
    if SOFTMAX:
        one = tl.exp(one - tl.max(one, 0))
        one = one / tl.sum(one, 0)
    bits = one.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as the numbers that they are bits of
    LEAST: tl.constexpr = -(2**63)
    key = (ordered.to(tl.int64) << 32) | (EP - 1 - cols).to(tl.int64)
    key = tl.where(cols < E, key, LEAST)
    places_in = tl.arange(0, CP)
    best = tl.zeros([CP], tl.float32)
    for j in tl.static_range(COUNT):
        top = tl.max(key, 0)
        place = EP - 1 - (top & 0xFFFFFFFF)
        bit = (top >> 32).to(tl.int32)
        bit = tl.where(bit < 0, bit ^ 0x7FFFFFFF, bit)
        best = tl.where(places_in == j, bit.to(tl.float32, bitcast=True), best)
        tl.store(places + token * COUNT + j, place)
        key = tl.where(key == top, LEAST, key)
    mask = places_in < COUNT
    if AFTER == 1:
        best = best / tl.sum(tl.where(mask, best, 0.0), 0)
    if AFTER == 2:
        best = tl.exp(best - tl.max(tl.where(mask, best, float("-inf")), 0))
        best = best / tl.sum(tl.where(mask, best, 0.0), 0)
    tl.store(values + token * COUNT + places_in, best.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _ordered(x):
    """Return float32 numbers as integers of the same order, with room for 32 bits below."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32


@triton.jit
def _number(key):
    """Return the number that an integer of `_ordered` is of."""
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _affinity(logit):
    return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def choose_by_group(
    logits, bias, values, places, factor,
    G: tl.constexpr, GP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, KEPT: tl.constexpr,
    COUNT: tl.constexpr, CP: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token a program: its G groups of S experts are the rows of a tile."""
    LEAST: tl.constexpr = -(2**63)
    group, member = tl.arange(0, GP), tl.arange(0, SP)
    place = group[:, None] * S + member[None, :]
    real = (group < G)[:, None] & (member < S)[None, :]
    wait(PDL)
    row = logits + tl.program_id(0) * G * S
    score = _affinity(tl.load(row + place, mask=real, other=0.0))
    score += tl.load(bias + place, mask=real, other=0.0).to(tl.float32)
    key = tl.where(real, _ordered(score) | (GP * S + SP - place).to(tl.int64), LEAST)
    first = tl.max(key, 1)
    second = tl.max(tl.where(key == first[:, None], LEAST, key), 1)
    total = tl.where(group < G, _number(first) + _number(second), 0.0)
    of_group = tl.where(group < G, _ordered(total) | (GP - group).to(tl.int64), LEAST)
    left = of_group
    for _i in tl.static_range(KEPT):
        left = tl.where(left == tl.max(left, 0), LEAST, left)
    key = tl.where((left != of_group)[:, None], key, LEAST)
    j = tl.arange(0, CP)
    chosen = tl.zeros([CP], tl.int64)
    for i in tl.static_range(COUNT):
        top = tl.max(tl.max(key, 1), 0)
        chosen = tl.where(j == i, GP * S + SP - (top & 0xFFFFFFFF), chosen)
        key = tl.where(key == top, LEAST, key)
    there = j < COUNT
    value = _affinity(tl.load(row + chosen, mask=there, other=0.0))
    if SHARE:
        value = value / (tl.sum(tl.where(there, value, 0.0), 0) + 1e-20)
    at = tl.program_id(0) * COUNT + j
    tl.store(values + at, value * factor, mask=there)
    tl.store(places + at, chosen, mask=there)
