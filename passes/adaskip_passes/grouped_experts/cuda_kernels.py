"""The operators of :mod:`ops` on CUDA, by Triton; imported at first use."""

from __future__ import annotations

import torch

from .ops import gate_grouped, gather_grouped, sum_grouped


@gather_grouped.register_kernel("cuda")
def _(hidden: torch.Tensor, order: torch.Tensor, count: int) -> torch.Tensor:
    from . import triton_kernels

    return triton_kernels.gathering(hidden, order, count).run()[0]


@gate_grouped.register_kernel("cuda")
def _(
    both: torch.Tensor,
    bias: torch.Tensor | None,
    experts: torch.Tensor,
    interleaved: bool,
    clamp: float,
    alpha: float,
) -> torch.Tensor:
    from . import triton_kernels

    return triton_kernels.gates(both, bias, experts, interleaved, clamp, alpha).run()[0]


@sum_grouped.register_kernel("cuda")
def _(
    outputs: torch.Tensor,
    places: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    from . import triton_kernels

    return triton_kernels.sums(outputs, places, chosen, shares, bias).run()[0]
