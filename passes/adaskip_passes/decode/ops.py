"""Operators of a decode step: what the compiler would launch as many kernels, in one.

A step of a few tokens per row reads every weight once, so its time is the time of reading; what a
kernel for each norm, projection, activation and add costs besides is most of what is left to gain.
These operators say what is computed; the reference implementations here say how, in plain torch,
and run on every device; on CUDA :mod:`cuda_kernels` takes their place.
"""

from __future__ import annotations

from enum import IntEnum

import torch

from .rotation import rotate

#: Rows of the batch times their tokens, up to which a step's kernels are the same.
ROW_TILES = (16, 32)
MAX_ROWS = ROW_TILES[-1]  # that one kernel takes


class Bounds(IntEnum):
    """Columns of a table of bounds: which keys of a cache the queries of a row may see.

    Query `t` of a row is at position ``END - 1 + t``. It sees the `WINDOW` keys up to its own, and
    the first `SINKS` ones (Xiao et al., "Efficient Streaming Language Models with Attention
    Sinks"), all of them from `FIRST` on. The key at position `p` is in slot ``BASE + p`` of its
    row and head in the cache. `EVERY` is a window that sees all.
    """

    FIRST = 0
    SINKS = 1
    WINDOW = 2
    END = 3
    BASE = 4


EVERY = 2**31 - 1


@torch.library.custom_op("adaskip::store", mutates_args=("buffer",))
def store(buffer: torch.Tensor, new: torch.Tensor, position: torch.Tensor) -> None:
    """Write new tokens of each row into a cache, from the row's position on.

    (As `index_put_`, but a compiler that tries kernels does not copy all of the cache first.)

    Args:
        buffer: [B, H, room, D].
        new: [B, H, T, D].
        position: int64 [B], on the device.
    """
    rows, heads, tokens = (torch.arange(n, device=new.device) for n in new.shape[:3])
    slots = (position.unsqueeze(1) + tokens).unsqueeze(1)
    buffer.index_put_((rows.view(-1, 1, 1), heads.view(1, -1, 1), slots), new.to(buffer.dtype))


@store.register_fake
def _(buffer: torch.Tensor, new: torch.Tensor, position: torch.Tensor) -> None:
    pass


@torch.library.custom_op("adaskip::attend", mutates_args=())
def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with a few queries per row to a part of a cache; K/V heads are not repeated.

    Args:
        query: [B, H, T, D].
        keys: [B, H_kv, room, D]; H is a multiple of H_kv. Only what is seen is read.
        values: [B, H_kv, room, D_v].
        bounds: What is seen, by row and K/V head: int64 [B, H_kv or 1, 1, 5], see `Bounds`; on
            the device and, on CUDA, never read by the host, so that a captured graph serves all.
        scale: Of the scores.
        softcap: Bound of the scores, ``softcap * tanh(score / softcap)``; 0 for none.
        sink_scores: A score of each head [H] that takes attention and gives nothing.

    Returns:
        [B, T, H, D_v], contiguous.

    """
    batch, heads, tokens, _ = query.shape
    groups, wide = heads // keys.shape[1], _wide(query)
    output = query.new_empty((batch, tokens, heads, values.shape[3]))
    for row, table in enumerate(bounds[:, :, 0].tolist()):
        for head in range(keys.shape[1]):
            first, sinks, window, end, base = table[head if len(table) > 1 else 0]
            position = torch.arange(first, end + tokens - 1, device=query.device)
            own = torch.arange(end - 1, end - 1 + tokens, device=query.device).unsqueeze(1)
            seen = (position <= own) & ((position > own - window) | (position < first + sinks))
            position, seen = position[seen.any(0)], seen[:, seen.any(0)]
            mine = slice(head * groups, (head + 1) * groups)
            stored = keys[row, head, base + position].to(wide)
            scores = query[row, mine].to(wide) @ stored.T * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~seen, float("-inf"))
            if sink_scores is not None:
                sink = sink_scores[mine].to(wide).view(-1, 1, 1).expand(-1, tokens, 1)
                scores = torch.cat((scores, sink), -1)
            shares = torch.softmax(scores, -1)[..., : position.shape[0]]
            shares = shares.masked_fill(~seen.any(-1, keepdim=True), 0)  # of padding
            mixed = shares.to(values.dtype) @ values[row, head, base + position]
            output[row, :, mine] = mixed.transpose(0, 1)
    return output


@attend.register_fake
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, values.shape[3]))


@torch.library.custom_op("adaskip::store_and_attend", mutates_args=("keys", "values"))
def store_and_attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
    rotary_dim: int = 0,
    interleaved: bool = False,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> torch.Tensor:
    """Store the keys and values of the queries' own tokens where they belong, and `attend`.

    Queries and new keys may be normalized before, head by head (Zhang and Sennrich, "Root Mean
    Square Layer Normalization", eq. 4), and rotated after that (Su et al., "RoFormer: Enhanced
    Transformer with Rotary Position Embedding", eq. 34), in float32, and are rounded once.

    Args:
        query: [B, H, T, D].
        keys: Like `attend`'s; query t's own key is written at its position, ``END - 1 + t``.
        values: Likewise.
        new_keys: [B, H_kv, T, D].
        new_values: [B, H_kv, T, D_v].
        cosines: Of the angles, [B or 1, 1, T, R], or [..., R / 2] for the pairs; None: nothing is
            rotated.
        sines: Likewise.
        bounds: As of `attend`.
        scale: Of the scores.
        softcap: Their bound; 0 for none.
        sink_scores: Of each head, or None.
        rotary_dim: R, how many of a head's first numbers are rotated; 0: all.
        interleaved: Whether neighbours are pairs, and not halves of the R.
        query_norm: Weight of the norm of queries [D]; None: they are not normalized.
        key_norm: Likewise of new keys; either both are, or none.
        eps: Added to the mean of squares.
        offset: Added to the weights.

    Returns:
        [B, T, H, D_v], contiguous.

    """
    dtypes = query.dtype, new_keys.dtype
    if query_norm is not None and key_norm is not None:
        query, new_keys = (
            _normalized(x, weight, eps, offset)
            for x, weight in ((query, query_norm), (new_keys, key_norm))
        )
    if cosines is not None and sines is not None:
        form = cosines, sines, rotary_dim, interleaved
        query, new_keys = (rotate(x, *form) for x in (query, new_keys))
    query, new_keys = query.to(dtypes[0]), new_keys.to(dtypes[1])
    for head in range(keys.shape[1]):
        entry = bounds[:, min(head, bounds.shape[1] - 1), 0]
        slots = entry[:, Bounds.END] - 1 + entry[:, Bounds.BASE]
        for buffer, new in ((keys, new_keys), (values, new_values)):
            store(buffer[:, head : head + 1], new[:, head : head + 1], slots)
    output: torch.Tensor = attend(query, keys, values, bounds, scale, softcap, sink_scores)
    return output


def _normalized(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """Return heads normalized in what is computed in, not rounded."""
    wide = x.to(_wide(x))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * scale * (weight.to(wide.dtype) + offset)


def _wide(x: torch.Tensor) -> torch.dtype:
    """Return what is computed in: float32, or what is wider."""
    return torch.promote_types(x.dtype, torch.float32)


@store_and_attend.register_fake
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
    rotary_dim: int = 0,
    interleaved: bool = False,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, values.shape[3]))
