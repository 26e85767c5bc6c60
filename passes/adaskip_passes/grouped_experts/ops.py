"""Operators beside the grouped products of experts, and how plain torch computes them.

Each pair of a token and one of its experts has a row, sorted by expert; PyTorch's ``grouped_mm``
multiplies the rows of each expert by its weights. What is beside the products moves bytes, and
kernels that a compiler makes of it move twice as many, or read neighbours apart.
"""

from __future__ import annotations

import torch

from ..decode.expert_ops import gated


@torch.library.custom_op("adaskip::gather_grouped", mutates_args=())
def gather_grouped(hidden: torch.Tensor, order: torch.Tensor, count: int) -> torch.Tensor:
    """Return the row of each pair's token, sorted by expert.

    Args:
        hidden: Tokens, [T, H], contiguous.
        order: Pairs in their order, int64 [S]; pair p is of token ``p // count``.
        count: How many experts a token has.

    Returns:
        [S, H].

    """
    return gathered_rows(hidden, order, count)


def gathered_rows(hidden: torch.Tensor, order: torch.Tensor, count: int) -> torch.Tensor:
    """Return what `gather_grouped` does; gradients flow through it."""
    return hidden[order // count]


@gather_grouped.register_fake
def _(hidden: torch.Tensor, order: torch.Tensor, count: int) -> torch.Tensor:
    return hidden.new_empty((order.shape[0], hidden.shape[1]))


@torch.library.custom_op("adaskip::gate_grouped", mutates_args=())
def gate_grouped(
    both: torch.Tensor,
    bias: torch.Tensor | None,
    experts: torch.Tensor,
    interleaved: bool,
    clamp: float,
    alpha: float,
) -> torch.Tensor:
    """Return what comes between the two products of each row's expert.

    Args:
        both: What the first product gives, [S, 2 I], contiguous.
        bias: Of each expert, [E, 2 I], contiguous, added before; or None.
        experts: Each row's, integers [S].
        interleaved: As of `run_experts`, and likewise clamp and alpha.
        clamp: Bound of gates and ups; 0 for SwiGLU.
        alpha: Factor in GPT-OSS's gate.

    Returns:
        [S, I].

    """
    return gated_rows(both, bias, experts, interleaved, clamp, alpha)


def gated_rows(
    both: torch.Tensor,
    bias: torch.Tensor | None,
    experts: torch.Tensor,
    interleaved: bool,
    clamp: float,
    alpha: float,
) -> torch.Tensor:
    """Return what `gate_grouped` does; gradients flow through it."""
    if bias is not None:
        both = both + bias[experts.to(torch.int64)]
    return gated(both, interleaved, clamp, alpha)


@gate_grouped.register_fake
def _(
    both: torch.Tensor,
    bias: torch.Tensor | None,
    experts: torch.Tensor,
    interleaved: bool,
    clamp: float,
    alpha: float,
) -> torch.Tensor:
    return both.new_empty((both.shape[0], both.shape[1] // 2))


@torch.library.custom_op("adaskip::sum_grouped", mutates_args=())
def sum_grouped(
    outputs: torch.Tensor,
    places: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Add up what each token's experts give, by their shares, in float32.

    Args:
        outputs: What the second product gives, [S, H], contiguous.
        places: Which rows are a token's, int64 [T, k].
        chosen: Of which experts they are, int64 [T, k].
        shares: What each counts, [T, k].
        bias: Of each expert, [E, H], contiguous, added before; or None.

    Returns:
        [T, H], of the outputs' dtype.

    """
    return summed_rows(outputs, places, chosen, shares, bias)


def summed_rows(
    outputs: torch.Tensor,
    places: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return what `sum_grouped` does; gradients flow through it."""
    wide = torch.promote_types(outputs.dtype, torch.float32)
    rows = outputs[places].to(wide)
    if bias is not None:
        rows = rows + bias[chosen].to(wide)
    return (rows * shares.unsqueeze(-1).to(wide)).sum(1).to(outputs.dtype)


@sum_grouped.register_fake
def _(
    outputs: torch.Tensor,
    places: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return outputs.new_empty((places.shape[0], outputs.shape[1]))
