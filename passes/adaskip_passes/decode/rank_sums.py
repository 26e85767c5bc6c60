"""Sums over the ranks of a model that is spread over several GPUs: ``adaskip::sum_over_ranks``.

A decode step on several ranks sums a few thousand numbers after each sublayer, and each sum waits
for all ranks: its time is that of a message, not of its bytes. On CUDA ranks of one machine write
their parts into each other's memory, in one kernel that adds the residual as well
(:mod:`.triton_kernels.rank_sums`); the all-reduce of PyTorch's is taken where that cannot be.
"""

from __future__ import annotations

import torch

from .. import _torch

#: Numbers that ranks exchange at once; more are the all-reduce's.
MOST_NUMBERS = 2**18


@torch.library.custom_op("adaskip::sum_over_ranks", mutates_args=())
def sum_over_ranks(x: torch.Tensor, residual: torch.Tensor | None, group: str) -> torch.Tensor:
    """Compute the sum of all ranks' `x`, and of a residual.

    Args:
        x: This rank's part, of the same shape on every rank.
        residual: Added to the sum, of x's shape and dtype, the same on every rank; None: nothing.
        group: Name of the process group.

    """
    return all_reduced(x, residual, group)


def all_reduced(x: torch.Tensor, residual: torch.Tensor | None, group: str) -> torch.Tensor:
    """Compute `sum_over_ranks` by the process group's own all-reduce."""
    total = _torch.all_reduced(x, group)
    return total if residual is None else total + residual


@sum_over_ranks.register_fake
def _(x: torch.Tensor, residual: torch.Tensor | None, group: str) -> torch.Tensor:
    return x.new_empty(x.shape)
