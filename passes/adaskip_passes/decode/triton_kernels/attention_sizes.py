"""How decode attention is cut into programs, and what each of them holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from ...infra.launch import shared_memory

PROGRAMS = 128
_MOST_QUERIES = 128  # of one program
_MOST_OF_LATENT = 16  # likewise: each is several times as wide, and held in registers
_MOST_SHARES = 64  # of a group of queries, where its results are that wide


class Sizes(NamedTuple):
    """Sizes of :func:`.decode_attention._attend`.

    Attributes:
        groups: Of queries, of all rows and K/V heads.
        group: Queries in one, padded.
        queries: Of a K/V head.
        rows: Of the batch, padded: one kernel for several batches.
        shares: Programs for one group at most.
        block: Keys at a time.
        stages: Blocks on their way, and one.
        warps: Of a program.
        own: New tokens, padded; one token is looked at without the matrix units.
        first: Numbers of a head's first part.
        padded: Likewise, padded.
        rest: Of the rest; 0 if there is none.
        padded_rest: Likewise, padded.
        padded_values: Of a value, padded.

    """

    groups: int
    group: int
    queries: int
    rows: int
    shares: int
    block: int
    stages: int
    warps: int
    own: int
    first: int
    padded: int
    rest: int
    padded_rest: int
    padded_values: int


def sizes(
    query: torch.Tensor, keys: torch.Tensor, value_dim: int, alike: bool, latent: bool
) -> Sizes:
    """Return the sizes of attention.

    Args:
        query: The queries, [B, H, T, D].
        keys: The keys, [B, H_kv, room, D].
        value_dim: Numbers of a value.
        alike: Whether all heads of a row see the same.
        latent: Whether keys are latents.

    """
    batch, heads, tokens, dim = query.shape
    first, padded, rest, padded_rest = _parts(dim, value_dim if latent else None)
    padded_values = max(16, triton.next_power_of_2(value_dim))
    queries = tokens * (heads // keys.shape[1])
    most = _MOST_OF_LATENT if latent else _MOST_QUERIES
    group = min(most, max(16, triton.next_power_of_2(queries)))
    by_row = keys.shape[1] * triton.cdiv(queries, group)
    rows, widest = triton.next_power_of_2(batch), max(padded, padded_values)
    shares, block, stages, warps = _blocks(rows * by_row, group, alike, widest)
    own = 1 if tokens == 1 and not latent else max(16, triton.next_power_of_2(tokens))
    size = keys.element_size()
    block = max(16, min(block, 32768 // (widest * size)))
    key_size = padded + (padded_rest if rest else 0)
    read = key_size + (0 if latent else padded_values)
    limit = shared_memory(query.device) // size
    block, stages = _fitting(limit, block, stages, group, own, key_size, read)
    if latent:
        shares, warps = min(shares, _MOST_SHARES), 8
    cut = batch * by_row, group, queries, rows, shares, block, stages, warps, own
    return Sizes(*cut, first, padded, rest, padded_rest, padded_values)


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


def _blocks(groups: int, group: int, alike: bool, widest: int) -> tuple[int, int, int, int]:
    """Return into how many programs the work is cut, and how each of them does it.

    They were chosen on an H200: a program a multiprocessor, with room for three blocks of keys, or
    four of narrow ones.

    Args:
        groups: Groups of queries, of all rows and K/V heads.
        group: Queries in one of them, padded.
        alike: Whether all heads of a row see the same; if not, one may take the programs of others.
        widest: Numbers of a head's keys or values, padded.

    Returns:
        Programs for one group at most (a power of two); keys at a time; stages; warps.

    """
    even = max(1, 1 << max(0, (PROGRAMS // groups).bit_length() - 1))
    shares = even if alike and groups <= 8 else min(4 * even, 64)
    few = group <= 32
    stages = 4 if few and widest <= 64 else 3
    return shares, 128 if few else 64, stages, 4 if group <= 64 else 8
