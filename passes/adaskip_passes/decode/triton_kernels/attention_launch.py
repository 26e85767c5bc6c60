"""How :mod:`.decode_attention` is launched: its sizes, arguments and constants."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ...infra.launch import Launch, has_pdl, shared_memory
from .combine import combine
from .decode_attention import _attend

_PROGRAMS = 128
_MOST_QUERIES = 128  # of one program
_MOST_OF_LATENT = 16  # likewise: each is several times as wide, and held in registers
_MOST_SHARES = 64  # of a group of queries, where its results are that wide


def attend(*inputs: Any, latent: bool = False) -> torch.Tensor:
    """Compute :func:`ops.store_and_attend`, which describes the inputs."""
    launches = attention(*inputs, latent=latent)
    for launch in launches:
        launch.run()
    return launches[-1].outputs[0]


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor | None,
    new_values: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
    rotary_dim: int = 0,
    interleaved: bool = False,
    unzipped: bool = False,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    *,
    latent: bool = False,
) -> list[Launch]:
    """Return the launches of :func:`ops.store_and_attend`, which describes the other inputs.

    Args:
        query: The queries.
        keys: The keys.
        values: The values.
        new_keys: Keys of the queries' own tokens, to be stored; None if they are.
        new_values: Likewise.
        cosines: Of the angles by which queries and new keys are rotated; None if they are.
        sines: Likewise.
        bounds: Which of them count.
        scale: Of the scores.
        softcap: Their bound; 0 for none.
        sink_scores: Of each head, or None.
        rotary_dim: How many of a head's numbers are rotated; 0: all.
        interleaved: Whether neighbours are pairs.
        unzipped: Whether they are put into halves then; of a latent's rest alone.
        query_norm: Weight of the norm of queries, of heads whose size is a power of two.
        key_norm: Likewise of new keys.
        eps: Of both.
        offset: Of both.
        latent: Whether keys are latents, which are the values as well, and values the rest of the
            keys: :func:`latent_ops.store_and_attend_latent`.

    """
    batch, heads, tokens, dim = query.shape
    kv_heads, value_dim = keys.shape[1], (keys if latent else values).shape[3]
    output = query.new_empty((batch, tokens, heads, value_dim))
    first, padded, rest, padded_rest = _parts(dim, value_dim if latent else None)
    padded_values = max(16, triton.next_power_of_2(value_dim))
    queries = tokens * (heads // kv_heads)
    most = _MOST_OF_LATENT if latent else _MOST_QUERIES
    group = min(most, max(16, triton.next_power_of_2(queries)))
    by_row = kv_heads * triton.cdiv(queries, group)
    groups, rows = batch * by_row, triton.next_power_of_2(batch)  # one kernel for several batches
    splits, block, stages, warps = _blocks(rows * by_row, group, alike=bounds.shape[1] == 1)
    stages += max(padded, padded_values) <= 64 and group <= 32
    own = 1 if tokens == 1 and not latent else max(16, triton.next_power_of_2(tokens))
    size = keys.element_size()
    limit = shared_memory(query.device) // size
    block = max(16, min(block, 32768 // (max(padded, padded_values) * size)))
    key_size = padded + (padded_rest if rest else 0)
    read = key_size + (0 if latent else padded_values)
    block, stages = _fitting(limit, block, stages, group, own, key_size, read)
    if latent:
        splits, warps = min(splits, _MOST_SHARES), 8
    partial = query.new_empty(groups * splits * group * padded_values, dtype=torch.float32)
    weight = query.new_empty(groups * splits * group * 2, dtype=torch.float32)
    used = query.new_empty(groups, dtype=torch.int32)
    query, *query_strides = _strided(query)
    new_keys, *new_key_strides = _strided(new_keys)
    new_values, *new_value_strides = _strided(new_values)
    turned = rest if latent else rotary_dim or dim
    pairs = cosines is not None and cosines.shape[3] != turned
    cosines, sines, step, *angle_strides = _angles(cosines, sines, batch)
    arguments = (
        *(query, keys, values, partial, weight, used, bounds, scale, softcap),
        *(new_keys, new_values, cosines, sines, query_norm, key_norm, eps, offset),
        *(*new_key_strides, *new_value_strides, *angle_strides),
        *(*query_strides, *keys.stride()[:3], *values.stride()[:3]),
        *(bounds.stride(0), bounds.stride(1), tokens, batch),
    )
    pdl = has_pdl(query.device)
    form = {
        **{"H": heads, "HK": kv_heads, "DV": value_dim, "DVP": padded_values, "GP": group},
        **{"SPLITS": splits, "PDL": pdl},
        **({"launch_pdl": True} if pdl else {}),
    }
    flags = {
        **form,
        **{"HB": bounds.shape[1], "D": first, "DP": padded, "PROGRAMS": _PROGRAMS},
        **{"DR": rest, "DRP": padded_rest, "LATENT": latent},
        **{"PAIRS": pairs, "STEP": step, "ROTARY": turned},
        **{"INTERLEAVED": interleaved, "UNZIPPED": unzipped},
        "EP": triton.next_power_of_2(rows * bounds.shape[1]),
        **{"TP": own, "BN": block, "num_warps": warps},
        "WIDE": max(_numel(keys), _numel(values)) >= 2**31,
        **{"STAGES": stages, "SOFTCAP": softcap != 0.0, "PLAIN": tokens == 1},
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    shares = Launch(_attend, (groups, splits), arguments, flags, [partial, weight, used])
    whole = (output, partial, weight, sink_scores, used, tokens)
    warps = max(2, min(8, splits * padded_values // 4096))
    programs = groups, min(group, queries)
    return [shares, Launch(combine, programs, whole, {**form, "num_warps": warps}, [output])]


def _parts(dim: int, first: int | None) -> tuple[int, int, int, int]:
    """Return how a head's numbers are read: in a first part and the rest, each with its padding.

    Args:
        dim: How many there are.
        first: How many are in the first part; None where that is free.

    """
    padded = max(16, triton.next_power_of_2(dim))
    begin = first if first is not None else 1 << (dim.bit_length() - 1)
    sizes = tuple(max(16, triton.next_power_of_2(n)) for n in (begin, dim - begin))
    if first is None and (begin == dim or sum(sizes) >= padded):
        return dim, padded, 0, 16
    return begin, sizes[0], dim - begin, sizes[1]


def _fitting(
    limit: int, block: int, stages: int, group: int, own: int, dim: int, read: int
) -> tuple[int, int]:
    """Return how many keys at a time and stages fit into shared memory, all counted in numbers.

    Args:
        limit: What there is of it.
        block: Keys at a time, at most.
        stages: At most.
        group: Queries.
        own: New tokens.
        dim: Of a head's queries and keys, padded.
        read: Of its keys and values together.

    """

    def taken() -> int:
        keys = stages * block + own
        return keys * read + group * (dim + block)

    while taken() > limit and (stages > 1 or block > 16):
        if stages > 2 or block <= 16:
            stages -= 1
        else:
            block //= 2
    return block, stages


def _numel(tensor: torch.Tensor) -> int:
    """Return a tensor's numbers; of one with symbolic sizes those of the example."""
    count = tensor.numel()
    return count.node.hint if isinstance(count, torch.SymInt) else count


def _strided(tokens: torch.Tensor | None) -> tuple[Any, ...]:
    """Return a tensor [B, H, T, D] without gaps in its last dimension, and its strides."""
    if tokens is None:
        return None, 0, 0, 0
    whole = tokens if tokens.stride(3) == 1 else tokens.contiguous()
    return whole, *whole.stride()[:3]


def _angles(
    cosines: torch.Tensor | None, sines: torch.Tensor | None, batch: int
) -> tuple[Any, ...]:
    """Return both for each row, how far their numbers are apart, rows and tokens.

    They may be the two parts of complex numbers.
    """
    if cosines is None or sines is None:
        return None, None, 1, 0, 0
    if cosines.stride(3) not in (1, 2) or cosines.stride() != sines.stride():
        cosines, sines = cosines.contiguous(), sines.contiguous()
    by_row = cosines.stride(0) if cosines.shape[0] == batch else 0
    return cosines, sines, cosines.stride(3), by_row, cosines.stride(2)


def _blocks(groups: int, group: int, alike: bool) -> tuple[int, int, int, int]:
    """Return into how many programs the work is cut, and how each of them does it.

    They were chosen on an H200: a program a multiprocessor, with room for three blocks of keys.

    Args:
        groups: Groups of queries, of all rows and K/V heads.
        group: Queries in one of them, padded.
        alike: Whether all heads of a row see the same; if not, one may take the programs of others.

    Returns:
        Programs for one group at most (a power of two); keys at a time; stages; warps.

    """
    even = max(1, 1 << max(0, (_PROGRAMS // groups).bit_length() - 1))
    splits = even if alike and groups <= 8 else min(4 * even, 64)
    return splits, 128 if group <= 32 else 64, 3, 4 if group <= 64 else 8
