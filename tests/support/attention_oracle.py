"""Attention by a table of bounds, key by key in float64: what `attend` must give."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

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
                if not slots:  # padding sees nothing
                    mass = mass + 1
                if case.sink_scores is not None:
                    mass = mass + case.sink_scores[head].double().cpu().exp()
                output[row, t, head] = weights @ values[row, head // groups, slots] / mass
    return output


@dataclass
class Step:
    """Inputs of `store_and_attend`: a case whose queries' own tokens are not stored yet.

    Attributes:
        case: What is to come out; its queries and keys are rotated.
        query, new_keys: Before they are rotated.
        keys, values: The buffers, NaN where the own tokens belong.
        cosines, sines: Of the angles, or None.
        rotary_dim: How many of a head's first numbers are rotated; 0: all.
        interleaved: Whether neighbours are pairs, and not halves.
    """

    case: Case
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    new_keys: torch.Tensor
    new_values: torch.Tensor
    cosines: torch.Tensor | None
    sines: torch.Tensor | None
    rotary_dim: int = 0
    interleaved: bool = False

    def arguments(self) -> tuple[object, ...]:
        new = self.new_keys, self.new_values, self.cosines, self.sines
        form = self.rotary_dim, self.interleaved
        return (self.query, self.keys, self.values, *new, *self.case.arguments()[3:], *form)

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both buffers as they must be after the step, 0 where there is nothing."""
        return self.case.keys.nan_to_num(), self.case.values.nan_to_num()


def step(
    case: Case,
    rotary: bool,
    by_row: bool = False,
    rotary_dim: int = 0,
    interleaved: bool = False,
) -> Step:
    """A step that gives `case`; with angles of each row, or the same for all of them."""
    batch, tokens, dim = case.query.shape[0], case.query.shape[2], case.query.shape[3]
    keys, values = case.keys.clone(), case.values.clone()
    new_keys, new_values = (
        torch.empty(batch, tokens, t.shape[1], t.shape[3], device=t.device, dtype=t.dtype)
        for t in (keys, values)
    )
    for row in range(batch):
        for head in range(keys.shape[1]):
            line = case.table[row]
            entry = line[head if len(line) > 1 else 0]
            slots = [entry[4] + entry[3] - 1 + t for t in range(tokens)]
            for buffer, new in ((keys, new_keys), (values, new_values)):
                new[row, :, head] = buffer[row, head, slots]
                buffer[row, head, slots] = math.nan
    keys_by_head, values_by_head = new_keys.transpose(1, 2), new_values.transpose(1, 2)
    if not rotary:
        return Step(case, case.query, keys, values, keys_by_head, values_by_head, None, None)
    pairs = (rotary_dim or dim) // 2
    angles = torch.rand(batch if by_row else 1, 1, tokens, pairs, dtype=torch.float64) * 6
    angles = angles.to(case.query.device)
    query, unrotated = (turned_back(x, angles, interleaved) for x in (case.query, keys_by_head))
    cosines, sines = (f(angles).float() for f in (torch.cos, torch.sin))
    form = rotary_dim, interleaved
    made = Step(case, query, keys, values, unrotated, values_by_head, cosines, sines, *form)
    return of_numbers(made)


def of_numbers(made: Step) -> Step:
    """The same step of angles for the pairs, with an angle for each number."""
    assert made.cosines is not None
    assert made.sines is not None
    if made.interleaved:
        cosines, sines = (t.repeat_interleave(2, -1) for t in (made.cosines, made.sines))
    else:
        cosines, sines = (torch.cat((t, t), -1) for t in (made.cosines, made.sines))
    return replace(made, cosines=cosines, sines=sines)


def of_pairs(made: Step) -> Step:
    """The same step with an angle for each pair, which are parts of a larger tensor."""
    assert made.cosines is not None
    assert made.sines is not None
    count = made.cosines.shape[-1] // 2
    some = slice(None, None, 2) if made.interleaved else slice(None, count)
    cosines, sines = (torch.cat((t[..., some], t), -1) for t in (made.cosines, made.sines))
    return replace(made, cosines=cosines[..., :count], sines=sines[..., :count])


def padded_into(rotary: bool, dtype: torch.dtype, device: str) -> Step:
    """A step whose row begins at its third token: there are two of padding, and two stored."""
    case = make(5, tokens=4, lengths=(3,), dtype=dtype, device=device)
    first, end, base = 4, 3, 2
    case.table = [[(first, 0, EVERY, end, base)]]
    for buffer in (case.keys, case.values):
        buffer[:, :, base : base + end + 3] = torch.randn_like(buffer[:, :, base : base + end + 3])
    made = step(case, rotary)
    for buffer in (case.keys, case.values, made.keys, made.values):
        buffer[:, :, : base + first] = math.nan
    return made


def turned_back(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """What is x when the first of a head's pairs are turned by the angles: as complex numbers."""
    turned, rest = x.double().tensor_split([2 * angles.shape[-1]], -1)
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).mT
    back = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), -angles)
    pairs = torch.view_as_real(back)
    turned = (pairs if interleaved else pairs.mT).flatten(-2)
    return torch.cat((turned, rest), -1).to(x.dtype)


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
