"""Attention to the keys that a mask shows, also with what PyTorch's own has no place for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend_seen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    sink_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to what is seen, with a soft cap or sink scores by scores that are written out.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, S, D]; H is a multiple of H_kv.
        value: [B, H_kv, S, D_v].
        seen: Bool, broadcast to [B, H, T, S]; None for everything.
        scale: Of the scores.
        softcap: Bound of the scores, ``softcap * tanh(score / softcap)``; 0 for none (Gemma 2).
        sink_scores: A score of each head [H] that takes attention and gives nothing (GPT-OSS).

    Returns:
        [B, T, H, D_v], contiguous.

    """
    if softcap or sink_scores is not None:
        mixed = _written_out(query, key, value, seen, scale, softcap, sink_scores)
    else:
        grouped = query.shape[1] != key.shape[1]
        mixed = scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale, enable_gqa=grouped
        )
    return mixed.transpose(1, 2).contiguous()


def attend_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with one query [B, H, 1, D] to all keys, with scores written out; see `attend_seen`.

    A step of a small model waits for calls: there are as few of them as can be.
    """
    batch, heads, _, dim = query.shape
    kv_heads, narrow = key.shape[1], query.dtype.itemsize < 4  # whose queries would lose bits
    factor = scale / softcap if softcap else scale
    rows = (query if narrow else query * factor).view(batch, kv_heads, -1, dim)
    product: Callable[..., torch.Tensor] = _head_by_head if narrow else torch.matmul
    if batch == 1 and not narrow:
        rows, key, value, product = rows[0], key[0], value[0], torch.bmm
    scores = product(rows, key.transpose(-1, -2))
    if narrow:
        scores = scores.float().mul_(factor)
    if softcap:
        scores = scores.tanh_().mul_(softcap)
    if sink_scores is not None:
        sinks = sink_scores.to(scores.dtype).view(kv_heads, -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    shares = torch.softmax(scores, -1)
    if sink_scores is not None:
        shares = shares[..., :-1]
    return product(shares.to(value.dtype), value).view(batch, 1, heads, -1)


def _head_by_head(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Return rows [B, H, G, n] times matrices [B, H, n, m] of 16 bits.

    As one product they take twenty times as long on a CPU, where the matrices are a cache's keys.
    """
    places = [(row, head) for row in range(rows.shape[0]) for head in range(rows.shape[1])]
    return torch.stack([rows[p] @ matrices[p] for p in places]).view(*rows.shape[:3], -1)


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    """Return attention [B, H, T, D_v], softmax in float32; see `attend_seen`.

    Scores are what takes time: each line passes over them once, and nothing does where it can be
    done to the queries or the mask.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, stored = key.shape[1], key.shape[2]
    factor = scale / softcap if softcap else scale
    narrow = query.dtype.itemsize < 4  # whose queries would lose bits
    # heads of one key are more queries; products of 16 bits are faster on a CPU head by head
    rows = (heads // kv_heads, tokens) if narrow else (heads // kv_heads * tokens,)
    keys, values = (t.unsqueeze(2) if narrow else t for t in (key, value))
    queries = (query if narrow else query * factor).reshape(batch, kv_heads, *rows, dim)
    scores = torch.matmul(queries, keys.transpose(-1, -2)).view(batch, heads, tokens, stored)
    if narrow:
        scores = scores.float() * factor
    if softcap:
        scores = torch.tanh(scores)
    if seen is not None:  # not infinity: a padding token sees nothing, and must not become NaN
        least = torch.finfo(scores.dtype).min
        hidden = torch.zeros(seen.shape, dtype=scores.dtype, device=seen.device)
        hidden = hidden.masked_fill_(~seen, least)
        scores = torch.add(hidden, scores, alpha=softcap or 1.0)
    elif softcap:
        scores = scores * softcap
    if sink_scores is not None:
        sinks = sink_scores.to(scores.dtype).view(1, heads, 1, 1).expand(batch, -1, tokens, -1)
        scores = torch.cat((scores, sinks), -1)
    shares = torch.softmax(scores, -1)[..., :stored].to(value.dtype)
    shares = shares.reshape(batch, kv_heads, *rows, stored)
    return torch.matmul(shares, values).view(batch, heads, tokens, -1)
