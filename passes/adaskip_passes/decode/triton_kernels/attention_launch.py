"""How :mod:`.decode_attention` is launched: its sizes, arguments and constants."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .decode_attention import _attend, _combine_apart
from .launch import Launch, has_pdl

_PROGRAMS = 128
_MOST_QUERIES = 128  # of one program


def attend(*inputs: Any) -> torch.Tensor:
    """Compute :func:`ops.attend`, which describes the inputs; `counters` come last."""
    launches = attention(*inputs)
    for launch in launches:
        launch.run()
    return launches[-1].outputs[0]


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor | None,
    new_values: torch.Tensor | None,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
    counters: torch.Tensor,
) -> list[Launch]:
    """Return the launches of :func:`ops.attend`, which describes the other inputs.

    Args:
        query: The queries.
        keys: The keys.
        values: The values.
        new_keys: Keys of the queries' own tokens, to be stored; None if they are.
        new_values: Likewise.
        bounds: Which of them count.
        scale: Of the scores.
        softcap: Their bound; 0 for none.
        sink_scores: Of each head, or None.
        counters: int32, one for each row and K/V head; they are zero before and after.

    """
    batch, heads, tokens, dim = query.shape
    kv_heads, value_dim = keys.shape[1], values.shape[3]
    output = query.new_empty((batch, tokens, heads, value_dim))
    padded, padded_values = (max(16, triton.next_power_of_2(n)) for n in (dim, value_dim))
    queries = tokens * (heads // kv_heads)
    group = min(_MOST_QUERIES, max(16, triton.next_power_of_2(queries)))
    groups = batch * kv_heads * triton.cdiv(queries, group)
    programs, splits, block, stages, warps = _blocks(groups, group, tokens)
    apart = tokens > 1
    partial = query.new_empty(groups * splits * group * padded_values, dtype=torch.float32)
    weight = query.new_empty(groups * splits * group * 2, dtype=torch.float32)
    used = query.new_empty(groups if apart else 1, dtype=torch.int32)
    sinks = query if sink_scores is None else sink_scores
    pdl = has_pdl(query.device)
    asked = _strided(query, query)
    new = *_strided(new_keys, query), *_strided(new_values, query)
    arguments = (
        *(asked[0], keys, values, output, partial, weight, counters, used, bounds),
        *(sinks, scale, softcap, new[0], new[4], *new[1:4], *new[5:], *asked[1:]),
        *(keys.stride(0), keys.stride(1), keys.stride(2)),
        *(values.stride(0), values.stride(1), values.stride(2)),
        *(bounds.stride(0), bounds.stride(1), tokens),
    )
    wide = max(padded, padded_values) * keys.element_size()
    some = max(1, min(triton.next_power_of_2(queries), 16384 // (splits * padded_values)))
    form = {
        **{"H": heads, "HK": kv_heads, "DV": value_dim, "DVP": padded_values, "GP": group},
        **{"SPLITS": splits, "SINKS": sink_scores is not None, "PDL": pdl, "num_warps": warps},
        **({"launch_pdl": True} if pdl else {}),
    }
    flags = {
        **form,
        **{"B": batch, "HB": bounds.shape[1], "D": dim, "DP": padded, "PROGRAMS": programs},
        "EP": triton.next_power_of_2(batch * bounds.shape[1]),
        "GB": min(some, group),
        "BN": max(16, min(block, 32768 // wide)),
        "STORE": new_keys is not None,
        "WIDE": max(_numel(keys), _numel(values)) >= 2**31,
        **{"STAGES": stages, "SOFTCAP": softcap != 0.0, "PLAIN": tokens == 1, "APART": apart},
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    launches = [Launch(_attend, (groups, splits), arguments, flags, [output])]
    if apart:
        rest = (output, partial, weight, sinks, used, tokens)
        alone = {**form, "GB": 1, "num_warps": 2}
        launches.append(Launch(_combine_apart, (groups, group), rest, alone, [output]))
    return launches


def _numel(tensor: torch.Tensor) -> int:
    """Return a tensor's numbers; of one with symbolic sizes those of the example."""
    count = tensor.numel()
    return count.node.hint if isinstance(count, torch.SymInt) else count


def _strided(tokens: torch.Tensor | None, instead: torch.Tensor) -> tuple[Any, ...]:
    """Return a tensor [B, H, T, D] without gaps in its last dimension, and its strides."""
    if tokens is None:
        return instead, 0, 0, 0
    whole = tokens if tokens.stride(3) == 1 else tokens.contiguous()
    return whole, *whole.stride()[:3]


def _blocks(groups: int, group: int, tokens: int) -> tuple[int, int, int, int, int]:
    """Return into how many programs the work is cut, and how each of them does it.

    They were chosen on an H200. With few groups, small programs, two on a multiprocessor, that
    leave room for the next kernel's to begin: alone they are slower, in a step they are faster.
    Else a program a multiprocessor, with room for three blocks of keys.

    Args:
        groups: Groups of queries, of all rows and K/V heads.
        group: Queries in one of them, padded.
        tokens: Queries of each row and head.

    Returns:
        Programs for all; at most, for one group (a power of two); keys at a time; stages; warps.

    """
    if groups <= 8 and tokens == 1:
        return 256, max(1, 1 << ((256 // groups).bit_length() - 1)), 64, 2, 4
    even = max(1, 1 << max(0, (_PROGRAMS // groups).bit_length() - 1))
    block = 128 if group <= 32 else 64
    return _PROGRAMS, even if groups <= 8 else min(4 * even, 64), block, 3, 4
