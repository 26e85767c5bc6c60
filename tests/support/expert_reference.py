"""Experts with random weights, and what they give written out in float64, pair by pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALPHA = 1.702


@dataclass
class Experts:
    """The arguments of the operator, by name."""

    hidden: Tensor
    chosen: Tensor
    shares: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    transposed: bool
    interleaved: bool
    clamp: float
    alpha: float
    residual: Tensor

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments, in order."""
        return tuple(vars(self).values())


def random_experts(
    tokens: int,
    count: int,
    chosen: int,
    transposed: bool,
    interleaved: bool,
    clamp: float,
    biased: bool,
    *,
    dtype: torch.dtype,
    width: int = 72,
    inner: int = 40,
    device: str = "cpu",
) -> Experts:
    """Return experts whose sizes are no powers of two; a token may choose one of them twice."""
    random = torch.Generator(device).manual_seed(tokens + 7 * count)

    def normal(*shape: int) -> Tensor:
        wide = torch.randn(*shape, generator=random, device=device)
        return (wide / shape[-2] ** 0.5 if len(shape) > 2 else wide).to(dtype)

    up, down = normal(count, width, 2 * inner), normal(count, inner, width)
    if not transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    return Experts(
        normal(tokens, width),
        torch.randint(0, count, (tokens, chosen), generator=random, device=device),
        torch.rand(tokens, chosen, generator=random, device=device),
        up,
        down,
        normal(count, 2 * inner) if biased else None,
        normal(count, width) if biased else None,
        transposed,
        interleaved,
        clamp,
        ALPHA,
        normal(tokens, width).view(tokens, 1, width),
    )


def written_out(one: Experts) -> Tensor:
    """Return the result in float64 [T, H]; shares no code with the operator."""
    output = one.residual.double().view(one.hidden.shape).clone()
    for token, row in enumerate(one.chosen.tolist()):
        for place, expert in enumerate(row):
            if not 0 <= expert < one.up.shape[0]:
                continue
            up, down = one.up[expert].double(), one.down[expert].double()
            if one.transposed:
                up, down = up.mT, down.mT
            both = up @ one.hidden[token].double()
            if one.up_bias is not None:
                both = both + one.up_bias[expert].double()
            half = both.shape[0] // 2
            gate, other = (both[::2], both[1::2]) if one.interleaved else both.split(half)
            if one.clamp:
                gate = gate.minimum(torch.tensor(one.clamp, device=gate.device))
                other = other.maximum(torch.tensor(-one.clamp, device=gate.device))
                other = 1 + other.minimum(torch.tensor(one.clamp, device=gate.device))
            slope = one.alpha if one.clamp else 1.0
            each = down @ (other * gate / (1 + (-slope * gate).exp()))
            if one.down_bias is not None:
                each = each + one.down_bias[expert].double()
            output[token] += each * one.shares[token, place].double()
    return output
