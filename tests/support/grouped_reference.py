"""Rows that are sorted by expert, and what becomes of them written out in float64, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALPHA = 1.702


@dataclass
class Grouped:
    """Rows of pairs of a token and an expert, before and after the products."""

    both: Tensor
    up_bias: Tensor | None
    experts: Tensor
    interleaved: bool
    clamp: float
    outputs: Tensor
    places: Tensor
    chosen: Tensor
    shares: Tensor
    down_bias: Tensor | None

    @property
    def gate_inputs(self) -> tuple[Any, ...]:
        """Inputs of `gate_grouped`."""
        return self.both, self.up_bias, self.experts, self.interleaved, self.clamp, ALPHA

    @property
    def sum_inputs(self) -> tuple[Any, ...]:
        """Inputs of `sum_grouped`."""
        return self.outputs, self.places, self.chosen, self.shares, self.down_bias


def random_rows(
    tokens: int,
    among: int,
    count: int,
    interleaved: bool,
    clamp: float,
    biased: bool,
    *,
    dtype: torch.dtype,
    width: int = 72,
    inner: int = 40,
    device: str = "cpu",
) -> Grouped:
    """Return rows whose sizes are no powers of two; a token may have chosen an expert twice."""
    random = torch.Generator(device).manual_seed(tokens + 7 * count)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    chosen = torch.randint(0, among, (tokens, count), generator=random, device=device)
    experts, order = chosen.reshape(-1).sort()
    places = order.argsort().view(tokens, count)
    return Grouped(
        normal(tokens * count, 2 * inner),
        normal(among, 2 * inner) if biased else None,
        experts.to(torch.int16),
        interleaved,
        clamp,
        normal(tokens * count, width),
        places,
        chosen,
        torch.rand(tokens, count, generator=random, device=device).to(dtype),
        normal(among, width) if biased else None,
    )


def gated_by_row(one: Grouped) -> Tensor:
    """Return the gates in float64; shares no code with the operator."""
    rows = []
    for row, expert in zip(one.both.double(), one.experts.tolist(), strict=True):
        both = row if one.up_bias is None else row + one.up_bias[expert].double()
        gate, up = (both[::2], both[1::2]) if one.interleaved else both.split(both.shape[0] // 2)
        if one.clamp:
            bound = torch.tensor(one.clamp, dtype=torch.float64, device=both.device)
            gate, up = gate.minimum(bound), up.minimum(bound).maximum(-bound) + 1
        slope = ALPHA if one.clamp else 1.0
        rows.append(up * gate / (1 + (-slope * gate).exp()))
    return torch.stack(rows)


def summed_by_token(one: Grouped) -> Tensor:
    """Return the sums in float64; shares no code with the operator."""
    totals = torch.zeros(one.places.shape[0], one.outputs.shape[1], dtype=torch.float64)
    totals = totals.to(one.outputs.device)
    for token, row in enumerate(one.places.tolist()):
        for at, place in enumerate(row):
            each = one.outputs[place].double()
            if one.down_bias is not None:
                each = each + one.down_bias[int(one.chosen[token, at])].double()
            totals[token] += each * one.shares[token, at].double()
    return totals
