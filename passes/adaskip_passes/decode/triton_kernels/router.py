"""The largest of a token's scores, as a router chooses experts."""

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
