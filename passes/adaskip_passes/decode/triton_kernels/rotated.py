"""Heads that are normalized and rotated while they are loaded."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotated(
    x, cosines, sines, rows, at, d, mask, D: tl.constexpr, ROTARY: tl.constexpr,
    PAIRS: tl.constexpr, STEP: tl.constexpr, INTERLEAVED: tl.constexpr, UNZIPPED: tl.constexpr,
    norm=None, eps=0.0, offset=0.0,
):  # fmt: skip
    """Load what `rows` of x point to, rotated by the angles at `at` if there are cosines.

    Of the D numbers of a head the first ROTARY are rotated. With PAIRS there is an angle for each
    pair, and else for each number, STEP apart.

    Rotary position embeddings (Su et al., "RoFormer", eq. 34): pairs are neighbours if they are
    INTERLEAVED, and else halves of the ROTARY. UNZIPPED neighbours of all of a head become halves.

    Before, heads are normalized if there is a weight `norm`: by the root of the mean of their
    squares and `eps` (`d` is all of a head then), and multiplied by the weight and `offset`.
    """
    own = d
    if UNZIPPED:
        own = tl.where(d < ROTARY // 2, 2 * d, 2 * d - ROTARY + 1)
    value = tl.load(x + rows[:, None] + own[None, :], mask=mask, other=0.0)
    if cosines is not None or norm is not None:
        wide = value.to(tl.float32)
        scale = 1.0
        if norm is not None:
            scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
            by = tl.load(norm + own, mask=own < D, other=0.0).to(tl.float32) + offset
            wide *= scale * by[None, :]
        if cosines is not None:
            if INTERLEAVED:
                is_first, other = own % 2 == 0, own ^ 1
            else:
                is_first = d < ROTARY // 2
                other = tl.where(is_first, d + ROTARY // 2, d - ROTARY // 2)
            sign = tl.where(is_first, -1.0, 1.0)
            angle = own
            if PAIRS:
                angle = own // 2 if INTERLEAVED else tl.where(is_first, d, other)
            turns = mask
            if ROTARY < D:
                turns = mask & (d < ROTARY)[None, :]
            pair = tl.load(x + rows[:, None] + other[None, :], mask=turns, other=0.0)
            pair = pair.to(tl.float32)
            if norm is not None:
                by = tl.load(norm + other, mask=(other >= 0) & (other < D), other=0.0)
                pair *= scale * (by.to(tl.float32) + offset)[None, :]
            angle = at[:, None] + angle[None, :] * STEP
            cosine = tl.load(cosines + angle, mask=turns, other=0.0)
            sine = tl.load(sines + angle, mask=turns, other=0.0)
            turned = wide * cosine + sign[None, :] * pair * sine
            wide = tl.where(turns, turned, wide) if ROTARY < D else turned
        value = wide.to(value.dtype)
    return value
