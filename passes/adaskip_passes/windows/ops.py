"""Attention of prompts that sees the last tokens and the first ones, by K/V head.

The token at position t sees the one at j if ``t - tokens < j <= t`` or ``j < sinks`` (Xiao et al.,
"Efficient Streaming Language Models with Attention Sinks", section 3). Sinks and tokens come as a
table, int64 [H_kv, 2] on the CPU: data, so that one compiled piece serves all windows. Queries are
taken a few at a time, with the keys that they see, so the work follows the window.

On a static cache the same numbers are columns of a table of bounds (:mod:`.bounds`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..attention.ops import attend_causal
from ..decode.ops import EVERY

_EVERYTHING = (0, EVERY)  # sinks and tokens

_AT_ONCE = 128  # queries at least: fewer would be many small products


@torch.library.custom_op("adaskip::attend_windowed", mutates_args=())
def attend_windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
) -> torch.Tensor:
    """Attend with the last T of S tokens to those in each one's window; heads are not repeated.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, S, D]; H is a multiple of H_kv.
        value: [B, H_kv, S, D_v].
        windows: Sinks and tokens of each K/V head, int64 [H_kv, 2], on the CPU; None where all
            heads see `own` tokens.
        own: Tokens that the model itself sees there; `EVERY` for all. The smaller one counts, and
            there are no sinks but where it is `EVERY`.
        scale: Of the scores.

    Returns:
        [B, T, H, D_v], contiguous.

    """
    return by_window(query, key, value, windows, own, scale, in_blocks)


@attend_windowed.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[3]))


@torch.library.custom_op("adaskip::attend_packed_windowed", mutates_args=())
def attend_packed_windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
) -> torch.Tensor:
    """Do what `attend_windowed` does within each of several texts that follow one another.

    Args:
        query: [1, H, N, D].
        key: [1, H_kv, N, D]; H is a multiple of H_kv.
        value: [1, H_kv, N, D_v].
        offsets: Where each text begins, and N: int32 [texts + 1], on the CPU.
        windows: As of `attend_windowed`.
        own: Likewise.
        scale: Of the scores.

    Returns:
        [1, N, H, D_v], contiguous.

    """
    heads, tokens = query.shape[1:3]
    output = query.new_empty((1, tokens, heads, value.shape[3]))
    for begin, end in itertools.pairwise(offsets.tolist()):
        q, k, v = (t.narrow(2, begin, end - begin) for t in (query, key, value))
        output[:, begin:end] = attend_windowed(q, k, v, windows, own, scale)
    return output


@attend_packed_windowed.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
) -> torch.Tensor:
    _, heads, tokens, _ = query.shape
    return query.new_empty((1, tokens, heads, value.shape[3]))


@torch.library.custom_op("adaskip::attend_masked_windowed", mutates_args=())
def attend_masked_windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    windows: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Do what `attend_windowed` does, of the tokens that a mask lets through.

    A query's own position is the last one that it sees, and the first token of a row the first one
    that any query of it sees. All scores are computed: this is for rows with holes.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, S, D]; H is a multiple of H_kv.
        value: [B, H_kv, S, D_v].
        mask: Bool [B or 1, 1, T, S], True where a query sees a key.
        windows: As of `attend_windowed`.
        scale: Of the scores.

    Returns:
        [B, T, H, D_v], contiguous.

    """
    batch, heads, tokens, _ = query.shape
    output = query.new_empty((batch, tokens, heads, value.shape[3]))
    position = torch.arange(key.shape[2], device=query.device)
    own = torch.where(mask, position, -1).amax(-1, keepdim=True)
    first = torch.where(mask, position, key.shape[2]).amin((-2, -1), keepdim=True)
    for chosen, (sinks, seen) in alike(windows, key.shape[2], EVERY, key.shape[1]):
        q, k, v, theirs = _heads(query, key, value, chosen)
        near = mask & ((position > own - seen) | (position < first + sinks))
        mixed = scaled_dot_product_attention(
            q, k, v, attn_mask=near, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        output[:, :, theirs] = mixed.transpose(1, 2)
    return output


@attend_masked_windowed.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    windows: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[3]))


def by_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
    attend: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Return what `attend_windowed` does, where heads of one window are computed by `attend`.

    Args:
        query: As of `attend_windowed`.
        key: Likewise.
        value: Likewise.
        windows: Likewise.
        own: Likewise.
        scale: Likewise.
        attend: From query, key, value, sinks, tokens and scale to [B, T, H, D_v].

    """
    batch, heads, tokens, _ = query.shape
    groups, output = alike(windows, key.shape[2], own, key.shape[1]), None
    for chosen, (sinks, seen) in groups:
        q, k, v, theirs = _heads(query, key, value, chosen)
        if seen >= key.shape[2]:
            mixed = attend_causal(q, k, v, scale)
        else:
            mixed = attend(q, k, v, sinks, seen, scale)
        if len(groups) == 1:
            return mixed
        if output is None:
            output = query.new_empty((batch, tokens, heads, value.shape[3]))
        output[:, :, theirs] = mixed
    assert output is not None
    return output


def alike(
    windows: torch.Tensor | None, stored: int, own: int, kv_heads: int
) -> list[tuple[list[int], tuple[int, int]]]:
    """Return the K/V heads that have one window, and it: sinks and tokens.

    Args:
        windows: [H_kv, 2]; None for none but `own`.
        stored: How many keys there are.
        own: Tokens that the model itself sees.
        kv_heads: How many K/V heads there are.

    """
    groups: dict[tuple[int, int], list[int]] = {}
    table = [(0, own)] * kv_heads if windows is None else windows.tolist()
    for head, (sinks, tokens) in enumerate(table):
        seen = min(tokens, own)
        groups.setdefault(_EVERYTHING if seen >= stored else (sinks, seen), []).append(head)
    return [(heads, window) for window, heads in groups.items()]


def _heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chosen: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, slice | torch.Tensor]:
    """Return queries, keys and values of some K/V heads, and which heads of the queries those are.

    What follows one another is a view.
    """
    group, first = query.shape[1] // key.shape[1], chosen[0]
    if chosen == list(range(first, first + len(chosen))):
        theirs = slice(first * group, (first + len(chosen)) * group)
        k, v = (t.narrow(1, first, len(chosen)) for t in (key, value))
        return query[:, theirs], k, v, theirs
    queries = on_device(tuple(h * group + i for h in chosen for i in range(group)), query.device)
    heads = on_device(tuple(chosen), query.device)
    return query[:, queries], key[:, heads], value[:, heads], queries


@functools.lru_cache(maxsize=4096)
def on_device(
    numbers: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Return indices on a device; to copy them there at every call would make the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: int,
    seen: int,
    scale: float,
) -> torch.Tensor:
    """Attend with a block of queries at a time to the keys that any of them sees."""
    batch, heads, tokens, _ = query.shape
    past, output = key.shape[2] - tokens, query.new_empty((batch, tokens, heads, value.shape[3]))
    position = torch.arange(key.shape[2], device=query.device)
    step = max(_AT_ONCE, seen // 2)
    for begin in range(0, tokens, step):
        end = min(begin + step, tokens)
        low = max(past + begin - seen + 1, 0)
        last = past + end - low
        k, v, at = (t.narrow(d, low, last) for t, d in ((key, 2), (value, 2), (position, 0)))
        before = min(sinks, low)  # sinks that are not among the last keys
        if before:
            firsts = ((key, k, 2), (value, v, 2), (position, at, 0))
            k, v, at = (torch.cat((t.narrow(d, 0, before), near), d) for t, near, d in firsts)
        own = position[past + begin : past + end].unsqueeze(1)
        near = None  # one query sees all of these
        if end - begin > 1:
            near = (at <= own) & ((at > own - seen) | (at < sinks))
        q = query.narrow(2, begin, end - begin)
        mixed = scaled_dot_product_attention(
            q, k, v, attn_mask=near, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        output[:, begin:end] = mixed.transpose(1, 2)
    return output
