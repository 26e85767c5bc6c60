"""Attention of a few queries per row over what a table of bounds lets them see: ``ops.attend``.

The keys and values of the queries' own tokens may be stored at once: ``ops.store_and_attend``.
A head of a size that is no power of two is read as a first part that is one, and the rest. Of a
latent cache the first part is the values as well, and the rest lies apart: ``latent_ops``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import LOG2_E
from .rotated import rotated


@triton.jit
def _part(bounds, T):
    """Return what a row and K/V head see: the first key, sinks' end, window's begin, how many."""
    first = tl.load(bounds).to(tl.int32)
    end = tl.load(bounds + 3).to(tl.int32)
    begin = tl.maximum(first, end - tl.load(bounds + 2).to(tl.int32))  # of the first query
    sinks = tl.minimum(first + tl.load(bounds + 1).to(tl.int32), begin) - first
    return first, sinks, begin, sinks + end + T - 1 - begin


@triton.jit
def _share(
    bounds, bounds_b, bounds_h, mine, T, B,
    HK: tl.constexpr, HB: tl.constexpr, EP: tl.constexpr,
    PROGRAMS: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return how many keys a program takes: as many in short rows as in long ones.

    `mine` are the keys of this row and head. The longest row is shared by as many programs as it
    can be, with no more than `PROGRAMS` for all rows, which run at once.
    """
    most = tl.cdiv(mine, BN)
    if EP == 1:  # one row
        return tl.maximum(tl.cdiv(most, SPLITS), 1) * BN
    e = tl.arange(0, EP)
    there = e < B * HB
    entry = bounds + (e // HB) * bounds_b + (e % HB) * bounds_h
    first = tl.load(entry, mask=there, other=0).to(tl.int32)
    end = tl.load(entry + 3, mask=there, other=0).to(tl.int32)
    begin = tl.maximum(first, end - tl.load(entry + 2, mask=there, other=0).to(tl.int32))
    sinks = tl.load(entry + 1, mask=there, other=0).to(tl.int32)
    sinks = tl.minimum(first + sinks, begin) - first
    blocks = tl.where(there, tl.cdiv(sinks + end + T - 1 - begin, BN), 0)
    most = tl.max(blocks, 0)
    shares = tl.minimum(PROGRAMS * most // (tl.sum(blocks, 0) * (HK // HB)), SPLITS)
    share = tl.cdiv(most, tl.maximum(shares, 1))
    while (shares > 1) & (tl.sum(tl.cdiv(blocks, share), 0) * (HK // HB) > PROGRAMS):
        shares -= 1
        share = tl.cdiv(most, shares)
    return share * BN


@triton.jit
def _scaled(scores, scale, softcap, SOFTCAP: tl.constexpr):
    scores *= scale
    if SOFTCAP:
        scores = softcap * (1 - 2 / (1 + tl.exp(2 * scores / softcap)))
    return scores * LOG2_E


@triton.jit
def _scores(
    q, k, q_rest, k_rest, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if q_rest is not None:
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
    return _scaled(scores, scale, softcap, SOFTCAP)


@triton.jit
def _score_of_one(q, k, q_rest, k_rest, scale, softcap, SOFTCAP: tl.constexpr):
    """Return the scores [queries] of one key [1, D], which no matrix unit is asked for."""
    scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
    if q_rest is not None:
        scores += tl.sum(q_rest.to(tl.float32) * k_rest.to(tl.float32), 1)
    return _scaled(scores, scale, softcap, SOFTCAP)


@triton.jit
def _add_one(best, mass, total, scores, v):
    """Add the value [1, D] of one key; see `_add`."""
    higher = tl.maximum(best, scores)
    known = tl.where(higher == float("-inf"), 0.0, higher)
    share = tl.exp2(scores - known)
    shrink = tl.exp2(best - known)
    total = total * shrink[:, None] + share[:, None] * v.to(tl.float32)
    return higher, mass * shrink + share, total


@triton.jit
def _add(best, mass, total, scores, v, PRECISION: tl.constexpr):
    """Add values by the scores of their keys to the softmax so far: its best score and mass."""
    higher = tl.maximum(best, tl.max(scores, 1))
    known = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen until here
    shares = tl.exp2(scores - known[:, None])
    shrink = tl.exp2(best - known)
    total = total * shrink[:, None]
    total = tl.dot(shares.to(v.dtype), v, total, input_precision=PRECISION)
    return higher, mass * shrink + tl.sum(shares, 1), total


@triton.jit
def _stored(
    q, q_rest, t, key_base, rest_base, value_base, mine, first, kept, begin, low, high, end,
    key_n, rest_n, value_n, scale, softcap,
    D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr, DRP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, PLAIN: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    LATENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to a share of the stored keys, the `low`-th to the `high`-th that are seen.

    Returns the best score of each query, its mass, and the sum of its values by their shares.
    """
    shift = tl.load(mine + 4).to(tl.int32)
    window, sink = tl.load(mine + 2).to(tl.int32), first + tl.load(mine + 1).to(tl.int32)
    d, dv, dr = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, DRP)
    best = tl.full([GP], float("-inf"), tl.float32)
    mass = tl.zeros([GP], tl.float32)
    total = tl.zeros([GP, DVP], tl.float32)
    for start in tl.range(low, high, BN, num_stages=STAGES):
        i = start + tl.arange(0, BN)
        at = tl.where(i < kept, first + i, begin + i - kept)
        slot = (shift + at)[:, None]
        if WIDE:
            slot = slot.to(tl.int64)
        k = tl.load(
            key_base + slot * key_n + d[None, :],
            mask=(i < high)[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        k_rest = None
        if DR > 0:
            k_rest = tl.load(
                rest_base + slot * rest_n + dr[None, :],
                mask=(i < high)[:, None] & (dr < DR)[None, :], other=0.0,
            )  # fmt: skip
        scores = _scores(q, k, q_rest, k_rest, scale, softcap, SOFTCAP, PRECISION)
        seen = (i < high)[None, :]
        if not PLAIN:
            last = (end - 1 + t)[:, None]
            seen = seen & ((at[None, :] > last - window) | (at < sink)[None, :])
            if CAUSAL:
                seen = seen & (at[None, :] <= last)
        if LATENT:
            v = k
        else:
            v = tl.load(
                value_base + slot * value_n + dv[None, :],
                mask=(i < high)[:, None] & (dv < DV)[None, :], other=0.0,
            )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
        best, mass, total = _add(best, mass, total, scores, v, PRECISION)
    return best, mass, total


@triton.jit(do_not_specialize=["B"])
def _attend(
    query, keys, values, partial, weight, shares_used, bounds, scale, softcap,
    new_keys, new_values, cosines, sines, query_norm, key_norm, eps, offset,
    new_key_b, new_key_h, new_key_t, new_value_b, new_value_h, new_value_t, angle_b, angle_t,
    query_b, query_h, query_t, key_b, key_h, key_n, value_b, value_h, value_n, bounds_b, bounds_h,
    T, B,
    H: tl.constexpr, HK: tl.constexpr, HB: tl.constexpr, EP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr, DRP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, GP: tl.constexpr, TP: tl.constexpr,
    PROGRAMS: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, PLAIN: tl.constexpr, WIDE: tl.constexpr,
    LATENT: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, UNZIPPED: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Flash decoding: a program GP queries of a K/V head and a share of what they see.

    The last share has the queries' own tokens, if they are new, and stores them. `combine` puts the
    shares together.
    """
    G: tl.constexpr = H // HK
    STORE: tl.constexpr = new_keys is not None
    group, split = tl.program_id(0), tl.program_id(1)
    groups = tl.cdiv(T * G, GP)
    head = group // groups
    b, h = head // HK, head % HK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    mine = bounds + b * bounds_b + (h % HB) * bounds_h
    first, kept, begin, count = _part(mine, T)
    share = _share(bounds, bounds_b, bounds_h, count, T, B, HK, HB, EP, PROGRAMS, SPLITS, BN)
    used = tl.cdiv(count, share)
    tl.store(shares_used + group, used)  # by every program: the same number
    if split < used:
        end = tl.load(mine + 3).to(tl.int32)
        high = tl.minimum((split + 1) * share, count)
        c, d, dv, dr = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, DRP)
        mine_of_head = (group % groups) * GP + c
        t = mine_of_head // G
        asks = b * query_b + (h * G + mine_of_head % G) * query_h + t * query_t
        turns = b * angle_b + t * angle_t
        real = (t < T)[:, None] & (d < D)[None, :]
        q_rest = None
        rest_real = (t < T)[:, None] & (dr < DR)[None, :]
        if LATENT:  # the rest alone is rotated
            q = tl.load(query + asks[:, None] + d[None, :], mask=real, other=0.0)
            q_rest = rotated(
                query + D, cosines, sines, asks, turns, dr, rest_real,
                DR, ROTARY, PAIRS, STEP, INTERLEAVED, UNZIPPED,
            )  # fmt: skip
        else:
            q = rotated(
                query, cosines, sines, asks, turns, d, real,
                D + DR, ROTARY, PAIRS, STEP, INTERLEAVED, UNZIPPED, query_norm, eps, offset,
            )  # fmt: skip
            if DR > 0:
                q_rest = rotated(
                    query, cosines, sines, asks, turns, D + dr, rest_real,
                    D + DR, ROTARY, PAIRS, STEP, INTERLEAVED, UNZIPPED,
                )  # fmt: skip
        key_base = keys + b.to(tl.int64) * key_b + h.to(tl.int64) * key_h
        value_base = values + b.to(tl.int64) * value_b + h.to(tl.int64) * value_h
        rest_base, rest_n = key_base + D, key_n
        if LATENT:
            rest_base, rest_n = value_base, value_n
        if STORE:
            high = tl.minimum(high, count - T)
            e = tl.arange(0, TP)
            own = (e < T) & (end - 1 + e >= first) & (split == used - 1)  # padding is none
            k_mask = own[:, None] & (d < D)[None, :]
            v_mask = own[:, None] & (dv < DV)[None, :]
            rest_mask = own[:, None] & (dr < DR)[None, :]
            places = b * new_key_b + h * new_key_h + e * new_key_t
            turns = b * angle_b + e * angle_t
            value_places = b * new_value_b + h * new_value_h + e * new_value_t
            if not LATENT:  # loaded before the stored ones, and looked at after them
                k_own = rotated(
                    new_keys, cosines, sines, places, turns, d, k_mask,
                    D + DR, ROTARY, PAIRS, STEP, INTERLEAVED, UNZIPPED, key_norm, eps, offset,
                )  # fmt: skip
                value_at = value_places[:, None] + dv[None, :]
                v_own = tl.load(new_values + value_at, mask=v_mask, other=0.0)
                rest_own = None
                if DR > 0:
                    rest_own = rotated(
                        new_keys, cosines, sines, places, turns, D + dr, rest_mask,
                        D + DR, ROTARY, PAIRS, STEP, INTERLEAVED, UNZIPPED,
                    )  # fmt: skip
        best, mass, total = _stored(
            q, q_rest, t, key_base, rest_base, value_base, mine, first, kept, begin, split * share,
            high, end, key_n, rest_n, value_n, scale, softcap, D, DP, DR, DRP, DV, DVP, GP, BN,
            STAGES, SOFTCAP, PLAIN, not STORE, WIDE, LATENT, PRECISION,
        )  # fmt: skip
        if STORE:  # noqa: SIM102  # decided while it is compiled
            if split == used - 1:
                slot = (tl.load(mine + 4).to(tl.int32) + end - 1 + e)[:, None]
                window, sink = tl.load(mine + 2).to(tl.int32), tl.load(mine + 1).to(tl.int32)
                if WIDE:
                    slot = slot.to(tl.int64)
                if LATENT:  # too wide to be held until now
                    k_own = tl.load(new_keys + places[:, None] + d[None, :], mask=k_mask, other=0.0)
                    rest_own = rotated(
                        new_values, cosines, sines, value_places, turns, dr, rest_mask,
                        DR, ROTARY, PAIRS, STEP, INTERLEAVED, UNZIPPED,
                    )  # fmt: skip
                    v_own = k_own
                tl.store(key_base + slot * key_n + d[None, :], k_own, mask=k_mask)
                if DR > 0:
                    tl.store(rest_base + slot * rest_n + dr[None, :], rest_own, mask=rest_mask)
                if not LATENT:
                    tl.store(value_base + slot * value_n + dv[None, :], v_own, mask=v_mask)
                if TP == 1:
                    scores = _score_of_one(q, k_own, q_rest, rest_own, scale, softcap, SOFTCAP)
                    there = (end - 1 >= first) & ((window > 0) | (end - 1 < first + sink))
                    scores = tl.where(there, scores, float("-inf"))
                    best, mass, total = _add_one(best, mass, total, scores, v_own)
                else:
                    scores = _scores(q, k_own, q_rest, rest_own, scale, softcap, SOFTCAP, PRECISION)
                    e_near = e[None, :] > t[:, None] - window
                    near = e_near | (end - 1 + e < first + sink)[None, :]
                    seen = own[None, :] & (e[None, :] <= t[:, None]) & near
                    scores = tl.where(seen, scores, float("-inf"))
                    best, mass, total = _add(best, mass, total, scores, v_own, PRECISION)
        slots = (group * SPLITS + split) * GP + c
        real = t < T
        part = partial + slots[:, None] * DVP + dv[None, :]
        tl.store(part, total, mask=real[:, None] & (dv < DV)[None, :])
        tl.store(weight + slots * 2, best, mask=real)
        tl.store(weight + slots * 2 + 1, mass, mask=real)
