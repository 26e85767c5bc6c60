"""The shares of one attention, put together."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def combine(
    output, partial, weight, sinks, shares, T,
    H: tl.constexpr, HK: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, GP: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write a query's result: those of the shares, weighted by their masses. A program a query.

    (The program of `_attend` that is the last to end could do it for all queries of its head, which
    saves a kernel; it takes longer, for it reads what many programs read at once here.)
    """
    G: tl.constexpr = H // HK
    group, c = tl.program_id(0), tl.program_id(1)  # which GP queries, and which of them
    groups = tl.cdiv(T * G, GP)
    head = group // groups
    b, h = head // HK, head % HK
    query = (group % groups) * GP + c  # of the head's T * G ones
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if query >= T * G:
        return
    s, dv = tl.arange(0, SPLITS), tl.arange(0, DVP)
    slots = (group * SPLITS + s) * GP + c
    there, real = s < tl.load(shares + group), dv < DV
    bests = tl.load(weight + slots * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
    masses = tl.load(weight + slots * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
    parts = tl.load(
        partial + slots[:, None] * DVP + dv[None, :],
        mask=there[:, None] & real[None, :], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    best = tl.max(bests, 0)
    best = tl.where(best == float("-inf"), 0.0, best)  # of padding, which sees nothing
    if sinks is not None:
        sink = tl.load(sinks + h * G + query % G).to(tl.float32) * LOG2_E
        best = tl.maximum(best, sink)
    factor = tl.exp2(bests - best)  # 0 for a share without keys
    mass = tl.sum(masses * factor, 0)
    if sinks is not None:
        mass += tl.exp2(sink - best)
    mass = tl.where(mass == 0.0, 1.0, mass)
    result = tl.sum(parts * factor[:, None], 0) / mass
    place = (b * T + query // G) * H + h * G + query % G
    tl.store(output + place * DV + dv, result.to(output.dtype.element_ty), mask=real)
