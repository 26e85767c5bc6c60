"""The shares of one attention, put together."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def combine(
    output, partial, weight, sinks, group, used, b, h, first, T,
    H: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, GP: tl.constexpr,
    GB: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Write the results of GB queries of a K/V head: the shares' ones, weighted by their masses.

    `group` is which of the groups of GP queries they are of, `first` the first of them in it.
    """
    s, dv = tl.arange(0, SPLITS), tl.arange(0, DVP)
    c = first + tl.arange(0, GB)
    slots = (group * SPLITS + s)[:, None] * GP + c[None, :]
    query = (group % tl.cdiv(T * G, GP)) * GP + c  # of the head's T * G ones
    real = (query < T * G) & (c < GP)
    there = real[None, :] & (s < used)[:, None]
    bests = tl.load(weight + slots * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
    masses = tl.load(weight + slots * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
    parts = tl.load(
        partial + slots[:, :, None] * DVP + dv[None, None, :],
        mask=there[:, :, None] & (dv < DV)[None, None, :], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    best = tl.max(bests, 0)
    best = tl.where(best == float("-inf"), 0.0, best)  # of what is no query
    if sinks is not None:
        sink = tl.load(sinks + h * G + query % G, mask=real, other=0.0).to(tl.float32) * LOG2_E
        best = tl.maximum(best, sink)
    factor = tl.exp2(bests - best[None, :])  # 0 for a share without keys
    mass = tl.sum(masses * factor, 0)
    if sinks is not None:
        mass += tl.exp2(sink - best)
    mass = tl.where(mass == 0.0, 1.0, mass)  # of padding, which sees nothing
    result = tl.sum(parts * factor[:, :, None], 0) / mass[:, None]
    place = (b * T + query // G) * H + h * G + query % G
    tl.store(
        output + place[:, None] * DV + dv[None, :],
        result.to(output.dtype.element_ty),
        mask=real[:, None] & (dv < DV)[None, :],
    )


@triton.jit
def combine_apart(
    output, partial, weight, sinks, shares, T,
    H: tl.constexpr, HK: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, GP: tl.constexpr,
    GB: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program GB queries: where there are many of them, one program a head would take long."""
    G: tl.constexpr = H // HK
    group = tl.program_id(0)
    head = group // tl.cdiv(T * G, GP)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    used = tl.load(shares + group)
    combine(
        output, partial, weight, sinks, group, used, head // HK, head % HK,
        tl.program_id(1) * GB, T, H, G, DV, DVP, GP, GB, SPLITS,
    )  # fmt: skip
