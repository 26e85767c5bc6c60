"""Attention by a table of bounds, key by key in float64: what `attend` must give."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

EVERY = 2**31 - 1


@dataclass
class Case:
    """Inputs of `attend`; what no query sees is NaN.

    Attributes:
        table: for each row and K/V head first, sinks, window, end and base.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    table: list[list[tuple[int, int, int, int, int]]]
    scale: float
    softcap: float
    sink_scores: torch.Tensor | None

    @property
    def bounds(self) -> torch.Tensor:
        return torch.tensor(self.table, device=self.query.device).unsqueeze(2)

    def arguments(self) -> tuple[object, ...]:
        return (
            *(self.query, self.keys, self.values, self.bounds),
            *(self.scale, self.softcap, self.sink_scores),
        )


def seen(entry: tuple[int, int, int, int, int], query: int) -> list[int]:
    """The positions that a query sees."""
    first, sinks, window, end, _ = entry
    own = end - 1 + query
    return [p for p in range(first, own + 1) if own - p < window or p - first < sinks]


def make(
    seed: int,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 1,
    dim: int = 16,
    value_dim: int | None = None,
    lengths: tuple[int, ...] = (40,),
    by_head: bool = False,
    windows: tuple[int, ...] = (EVERY,),
    sinks: tuple[int, ...] = (0,),
    softcap: float = 0.0,
    sink_scores: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """A case whose rows are padded by random amounts; `lengths` are those of their tokens."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    room = 64
    table = []
    for row in range(batch):
        length, first = lengths[row % len(lengths)], draw.choice((0, 3, 17))
        line = []
        for _ in range(kv_heads if by_head else 1):
            base = draw.choice((0, 0, 5, 30))
            entry = (first, draw.choice(sinks), draw.choice(windows), first + length, base)
            line.append(entry)
            room = max(room, entry[3] + base + tokens + 8)
        table.append(line)
    query = torch.randn(batch, heads, tokens, dim, device=device).to(dtype)
    shape = (room, batch, kv_heads)  # as buffers are: token by token
    keys = torch.full((*shape, dim), math.nan, device=device, dtype=dtype).permute(1, 2, 0, 3)
    values = torch.full((*shape, value_dim or dim), math.nan, device=device, dtype=dtype)
    values = values.permute(1, 2, 0, 3)
    for row in range(batch):
        for head in range(kv_heads):
            entry = table[row][head if by_head else 0]
            slots = {entry[4] + p for t in range(tokens) for p in seen(entry, t)}
            for kind in (keys, values):
                filled = torch.randn(len(slots), kind.shape[3], device=device).to(dtype)
                kind[row, head, sorted(slots)] = filled
    return Case(
        query,
        keys,
        values,
        table,
        dim**-0.5,
        softcap,
        torch.randn(heads, device=device).to(dtype) if sink_scores else None,
    )


def expected(case: Case) -> torch.Tensor:
    """[B, T, H, D_v] in float64."""
    batch, heads, tokens, _ = case.query.shape
    groups = heads // case.keys.shape[1]
    output = torch.empty(batch, tokens, heads, case.values.shape[3], dtype=torch.float64)
    query, keys, values = (t.double().cpu() for t in (case.query, case.keys, case.values))
    for row in range(batch):
        for head in range(heads):
            line = case.table[row]
            entry = line[head // groups if len(line) > 1 else 0]
            for t in range(tokens):
                slots = [entry[4] + p for p in seen(entry, t)]
                scores = keys[row, head // groups, slots] @ query[row, head, t] * case.scale
                if case.softcap:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                weights = scores.exp()
                mass = weights.sum()
                if case.sink_scores is not None:
                    mass = mass + case.sink_scores[head].double().cpu().exp()
                output[row, t, head] = weights @ values[row, head // groups, slots] / mass
    return output


#: Rows of other lengths, padding, windows with and without sinks, by row and by head, soft caps,
#: sink scores, several queries, values of another dimension.
CASES = {
    "one row": {},
    "one token stored": {"lengths": (1,)},
    "ragged": {"batch": 4, "lengths": (300, 17, 129, 1)},
    "several queries": {"batch": 2, "tokens": 8, "lengths": (200, 5)},
    "seventeen queries": {"tokens": 17, "heads": 8, "lengths": (150,)},
    "window": {"batch": 2, "windows": (7, 64), "lengths": (5, 200)},
    "window of several queries": {"tokens": 5, "windows": (3,), "lengths": (90,)},
    "window and sinks": {"windows": (16,), "sinks": (4,), "lengths": (100, 9), "batch": 2},
    "by head": {
        **{"batch": 3, "heads": 8, "kv_heads": 4, "by_head": True, "tokens": 3},
        **{"windows": (EVERY, 8, 33), "sinks": (0, 4), "lengths": (120, 40, 260)},
    },
    "soft cap": {"softcap": 2.0, "lengths": (70,)},
    "sink scores": {"sink_scores": True, "batch": 2, "lengths": (30, 2), "windows": (EVERY, 9)},
    "everything": {
        **{"batch": 2, "tokens": 4, "softcap": 5.0, "sink_scores": True, "sinks": (2,)},
        **{"windows": (12,), "lengths": (77, 20), "by_head": True},
    },
    "values of another dimension": {"dim": 24, "value_dim": 16, "tokens": 2},
    "one K/V head": {"heads": 7, "kv_heads": 1, "dim": 20, "lengths": (130,)},
}
