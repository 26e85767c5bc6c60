"""Attention of prompts in tiles, on the matrix units: all heads or some, windows, sinks, soft caps.

Of each head a program takes a tile of queries, and goes through the keys that any of them sees,
with the softmax so far in registers (Dao, "FlashAttention-2", algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...infra.launch import Launch, on_device, shared_memory


@triton.jit
def _add(
    mixed, total, most, q, keys, values, n, scale, cap, k_t, v_t, first_own, window, sinks, upper,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add KEYS keys from `n` on to a softmax that is under way; powers of two."""
    d, e, i = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, KEYS)
    j = n + i
    keys += tl.cast(n, tl.int64) * k_t
    values += tl.cast(n, tl.int64) * v_t
    k_at, v_at = i[:, None] * k_t + d[None, :], i[:, None] * v_t + e[None, :]
    if MASKED:  # what nobody sees may have no memory behind it
        there = (j < upper) & ((j > first_own - window) | (j < sinks))
        k = tl.load(keys + k_at, mask=there[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(values + v_at, mask=there[:, None] & (e < DV)[None, :], other=0.0)
    elif D < DP or DV < DVP:
        k = tl.load(keys + k_at, mask=(d < D)[None, :], other=0.0)
        v = tl.load(values + v_at, mask=(e < DV)[None, :], other=0.0)
    else:
        k, v = tl.load(keys + k_at), tl.load(values + v_at)
    scores = tl.dot(q, tl.trans(k)) * scale
    if CAPPED:  # by cap * tanh(x / 2), of x to the base 2
        scores = cap * (2.0 / (1.0 + tl.math.exp2(-scores)) - 1.0)
    if MASKED:
        own = first_own + tl.arange(0, ROWS)[:, None]
        near = (j[None, :] > own - window) | (j < sinks)[None, :]
        near = near & (j[None, :] <= own) & (j < upper)[None, :]
        scores = tl.where(near, scores, -float("inf"))
    highest = tl.maximum(most, tl.max(scores, 1))
    base = highest
    if MASKED:  # of a row that has seen nothing yet
        base = tl.where(highest == -float("inf"), 0.0, highest)
    shares, before = tl.math.exp2(scores - base[:, None]), tl.math.exp2(most - base)
    mixed = tl.dot(shares.to(v.dtype), v, mixed * before[:, None])
    return mixed, total * before + tl.sum(shares, 1), highest


@triton.jit(do_not_specialize=["T", "S", "sinks", "window"])
def _attend(
    query, keys, values, output, heads, sink_scores, H, T, S, HEADS, sinks, window, scale, cap,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAPPED: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head a program; the queries are the last T of the S tokens."""
    tiles = tl.cdiv(T, ROWS)
    of_all = tl.program_id(0) // tiles
    b, place = of_all // (HEADS * GROUP), of_all % (HEADS * GROUP)
    head = tl.load(heads + place // GROUP).to(tl.int64)
    h = head * GROUP + place % GROUP
    begin = tl.program_id(0) % tiles * ROWS
    t, d, e = begin + tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, DVP)
    q = tl.load(
        query + b.to(tl.int64) * q_b + h * q_h + t.to(tl.int64)[:, None] * q_t + d[None, :],
        mask=(t < T)[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    keys += b.to(tl.int64) * k_b + head * k_h
    values += b.to(tl.int64) * v_b + head * v_h
    own = S - T + begin  # of the first query
    end = tl.minimum(own + ROWS, S)
    low = tl.maximum(own - window + 1, 0) // KEYS * KEYS
    # From `inner` to `outer` all rows see all keys.
    inner = tl.maximum(tl.cdiv(tl.maximum(own + ROWS - window, 0), KEYS) * KEYS, low)
    outer = tl.maximum((own + 1) // KEYS * KEYS, inner)
    firsts = tl.minimum(sinks, low)
    a = tl.cdiv(firsts, KEYS)
    c = a + (inner - low) // KEYS
    masked = c + tl.cdiv(tl.maximum(end - outer, 0), KEYS)
    mixed, total = tl.zeros([ROWS, DVP], tl.float32), tl.zeros([ROWS], tl.float32)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    for n in range(inner, outer, KEYS):
        mixed, total, most = _add(
            mixed, total, most, q, keys, values, n, scale, cap, k_t, v_t, own, window, sinks, S,
            D, DP, DV, DVP, ROWS, KEYS, CAPPED, False,
        )  # fmt: skip
    for i in range(masked):
        n = tl.where(i < a, i, tl.where(i < c, low // KEYS + i - a, outer // KEYS + i - c)) * KEYS
        mixed, total, most = _add(
            mixed, total, most, q, keys, values, n, scale, cap, k_t, v_t, own, window, sinks,
            tl.where(i < a, firsts, S), D, DP, DV, DVP, ROWS, KEYS, CAPPED, True,
        )  # fmt: skip
    if SINK:  # which takes attention and gives nothing
        sink = tl.load(sink_scores + h).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(most, sink)
        before = tl.math.exp2(most - highest)
        mixed, total = mixed * before[:, None], total * before + tl.math.exp2(sink - highest)
    at = output + ((b.to(tl.int64) * T + t) * H + h)[:, None] * DV + e[None, :]
    mask = (t < T)[:, None] & (e < DV)[None, :]
    tl.store(at, (mixed / total[:, None]).to(output.dtype.element_ty), mask=mask)


_LOG2_E = 1.4426950408889634


class Seeing(NamedTuple):
    """How heads attend.

    Attributes:
        sinks: How many of the first keys are seen.
        window: How many of the last keys up to each query's own are seen.
        scale: Of the scores.
        softcap: Bound of the scores; 0 for none.
        sink_scores: Of all heads [H], or None.

    """

    sinks: int
    window: int
    scale: float
    softcap: float = 0.0
    sink_scores: torch.Tensor | None = None

    @property
    def factors(self) -> tuple[float, float]:
        """What products are multiplied by, and a bounded score, to be exponents of 2."""
        if self.softcap:
            return 2 * _LOG2_E * self.scale / self.softcap, _LOG2_E * self.softcap
        return _LOG2_E * self.scale, 0.0


class Tiles(NamedTuple):
    """How a program is cut: queries, keys at a time, warps, and loads that are under way."""

    rows: int
    keys: int
    warps: int
    stages: int


_TILES = (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2))
_OF_CHUNKS = Tiles(128, 64, 8, 4)


def _fitting(dim: int, value_dim: int, size: int, device: torch.device) -> Tiles:
    """Return the first tiles that fit into shared memory, or the last ones."""
    limit = shared_memory(device) // size
    for tiles in _TILES:
        if tiles.rows * dim + tiles.stages * tiles.keys * (dim + value_dim) <= limit:
            return tiles
    return _TILES[-1]


def attend(*inputs: Any) -> None:
    """Do what :func:`attention` describes."""
    attention(*inputs).run()


def attend_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Compute :func:`ops.attend_causal`, which describes the inputs; of 16 bits."""
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, tokens, dim = query.shape
    output = query.new_empty((batch, tokens, heads, dim))
    seeing = Seeing(0, key.shape[2], scale)
    # Programs of a chunk all see much; of a whole prompt smaller ones end more evenly.
    tiles = _OF_CHUNKS if dim == 128 and key.shape[2] >= 2 * tokens else None
    return attention(query, key, value, output, range(key.shape[1]), seeing, tiles).run()[0]


def causal_of_any_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> list[Launch]:
    """Return launches like those of `attend_causal`, to compile them for tensors like these."""
    batch, heads, tokens, dim = query.shape
    output, heads_kv = query.new_empty((batch, tokens, heads, dim)), key.shape[1]
    places = query.new_empty(heads_kv, dtype=torch.int32)
    kinds = (None, _OF_CHUNKS) if dim == 128 else (None,)
    inputs = query, key, value, output, places, Seeing(0, key.shape[2], scale)
    return [attention(*inputs, tiles) for tiles in kinds]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    heads: Sequence[int] | torch.Tensor,
    seeing: Seeing,
    tiles: Tiles | None = None,
) -> Launch:
    """Return the launch that writes what some heads see into their places of `output`.

    Args:
        query: [B, H, T, D], of 16 bits, numbers of a head side by side.
        key: [B, H_kv, S, D], likewise; the queries are the last of the S tokens.
        value: [B, H_kv, S, D_v], likewise.
        output: [B, T, H, D_v], contiguous.
        heads: The K/V heads, or these on the device, int32.
        seeing: What they see, and how.
        tiles: How programs are cut; chosen when None.

    """
    batch, count, tokens, dim = query.shape
    group, value_dim = count // key.shape[1], value.shape[3]
    dims = [max(16, triton.next_power_of_2(n)) for n in (dim, value_dim)]
    tiles = tiles or _fitting(dims[0], dims[1], query.element_size(), query.device)
    grid: Any = (triton.cdiv(tokens, tiles.rows) * batch * len(heads) * group,)
    on_host = not isinstance(heads, torch.Tensor)
    places = on_device(tuple(heads), query.device, torch.int32) if on_host else heads
    scores = seeing.sink_scores
    arguments = (
        *(query, key, value, output, places, places if scores is None else scores, count, tokens),
        *(key.shape[2], len(heads), seeing.sinks, min(seeing.window, key.shape[2])),
        *(*seeing.factors, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
    )
    flags = {
        **{"GROUP": group, "D": dim, "DP": dims[0], "DV": value_dim, "DVP": dims[1]},
        **{"ROWS": tiles.rows, "KEYS": tiles.keys},
        **{"CAPPED": bool(seeing.softcap), "SINK": scores is not None},
        **{"num_warps": tiles.warps, "num_stages": tiles.stages},
    }
    return Launch(_attend, grid, arguments, flags, [output])
