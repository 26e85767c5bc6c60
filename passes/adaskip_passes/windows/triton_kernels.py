"""The first keys, added to attention that saw the last ones."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _add_sinks(
    query, keys, values, output, masses, H, T, GROUP, past, sinks, window, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, DP: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head a program; `output` is [B, T, H, D], the masses are logarithms."""
    b, h = tl.program_id(1).to(tl.int64) // H, tl.program_id(1).to(tl.int64) % H
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d, s = tl.arange(0, DP), tl.arange(0, SINKS)
    real, inside = t < T, d < D
    seen = (s < sinks)[None, :] & (s[None, :] <= (past + t - window)[:, None]) & real[:, None]
    q = tl.load(
        query + b * q_b + h * q_h + t.to(tl.int64)[:, None] * q_t + d[None, :],
        mask=real[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    stored = (s < sinks)[:, None] & inside[None, :]
    head = h // GROUP
    k = tl.load(keys + b * k_b + head * k_h + s[:, None] * k_t + d[None, :], mask=stored, other=0.0)
    v = tl.load(
        values + b * v_b + head * v_h + s[:, None] * v_t + d[None, :], mask=stored, other=0.0
    )
    scores = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, -float("inf"))
    place = (b * H + h) * T + t
    mass = tl.load(masses + place, mask=real, other=0.0)
    most = tl.maximum(tl.max(scores, 1), mass)
    shares = tl.exp(scores - most[:, None])
    before = tl.exp(mass - most)
    whole = before + tl.sum(shares, 1)
    at = output + ((b * T + t) * H + h)[:, None] * D + d[None, :]
    both = real[:, None] & inside[None, :]
    mixed = tl.load(at, mask=both, other=0.0).to(tl.float32) * before[:, None]
    mixed += tl.dot(shares.to(v.dtype), v)
    tl.store(at, (mixed / whole[:, None]).to(output.dtype.element_ty), mask=both)


def add_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    masses: torch.Tensor,
    sinks: int,
    window: int,
    scale: float,
) -> None:
    """Add the first keys to attention to the last ones, which is changed in place.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, S, D]; the queries are the last of the S tokens.
        value: [B, H_kv, S, D].
        output: Attention to the last `window` keys up to each query's own, [B, T, H, D],
            contiguous.
        masses: Logarithms of the sums of its exponentiated scores, float32 [B, H, T].
        sinks: How many first keys are seen where they are not among the last ones.
        window: See `output`.
        scale: Of the scores.

    """
    batch, heads, tokens, dim = query.shape
    rows = 64
    grid: Any = (triton.cdiv(tokens, rows), batch * heads)
    _add_sinks[grid](
        query, key, value, output, masses.contiguous(), heads, tokens, heads // key.shape[1],
        key.shape[2] - tokens, sinks, window, scale,
        query.stride(0), query.stride(1), query.stride(2), key.stride(0), key.stride(1),
        key.stride(2), value.stride(0), value.stride(1), value.stride(2),
        D=dim, DP=max(16, triton.next_power_of_2(dim)),
        SINKS=max(16, triton.next_power_of_2(sinks)), ROWS=rows, num_warps=4,
    )  # fmt: skip
