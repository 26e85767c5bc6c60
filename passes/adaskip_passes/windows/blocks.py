"""How prompts see windows without a kernel of ours: heads of one window at a time, in blocks.

Queries are taken a few at a time, with the keys that they see, so the work follows the window.
"""

from __future__ import annotations

import torch

from ..attention.ops import attend_causal
from ..decode.ops import EVERY
from ..infra.launch import on_device
from .seen import attend_once, attend_seen

_EVERYTHING = (0, EVERY)  # sinks and tokens

_AT_ONCE = 128  # queries at least: fewer would be many small products


def by_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
    softcap: float = 0.0,
    sink_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what `ops.attend_windowed` does, of heads with one window together.

    Those that lie between others are views too: what a window does not show may have no memory.
    """
    batch, heads, tokens, _ = query.shape
    stored, plain = key.shape[2], not softcap and sink_scores is None
    if tokens == 1 and windows is None and not plain:
        if own < stored:
            key, value = (t.narrow(2, stored - own, own) for t in (key, value))
        return attend_once(query, key, value, scale, softcap, sink_scores)
    groups, output = _adjacent(alike(windows, stored, own, key.shape[1])), None
    for chosen, (sinks, seen) in groups:
        q, k, v, theirs = heads_of(query, key, value, chosen)
        if plain and seen >= stored:
            mixed = attend_causal(q, k, v, scale)
        else:
            scores = None if sink_scores is None else sink_scores[theirs]
            mixed = _in_blocks(q, k, v, sinks, min(seen, stored), scale, softcap, scores)
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


def _adjacent(
    groups: list[tuple[list[int], tuple[int, int]]],
) -> list[tuple[list[int], tuple[int, int]]]:
    """Return the same windows of heads that follow one another."""
    found = list[tuple[list[int], tuple[int, int]]]()
    for heads, window in groups:
        for head in heads:
            if found and found[-1][1] == window and found[-1][0][-1] == head - 1:
                found[-1][0].append(head)
            else:
                found.append(([head], window))
    return found


def heads_of(
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


def _in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: int,
    seen: int,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with a block of queries at a time to the keys that any of them sees."""
    batch, heads, tokens, _ = query.shape
    past, output = key.shape[2] - tokens, query.new_empty((batch, tokens, heads, value.shape[3]))
    position = torch.arange(key.shape[2], device=query.device)
    written = softcap or sink_scores is not None  # which takes memory for all scores
    step = _AT_ONCE if written else max(_AT_ONCE, seen // 2)
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
        mixed = attend_seen(q, k, v, near, scale, softcap, sink_scores)
        if end - begin == tokens:
            return mixed
        output[:, begin:end] = mixed
    return output
