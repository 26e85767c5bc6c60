"""What the chunks of a prompt hand on to each other: two operators, whatever the length.

Traced, a loop over chunks would be written out, and the graph good for one number of chunks only.
"""

from __future__ import annotations

import torch

from ..tracing.linear_scan import recurrence

__all__ = ["carry_decayed", "carry_products"]


@torch.library.custom_op("adaskip::carry_decayed", mutates_args=())
def carry_decayed(
    factors: torch.Tensor, terms: torch.Tensor, initial: torch.Tensor | None
) -> torch.Tensor:
    """Return a state before each chunk, and after the last one.

    It is ``h[i + 1] = factors[i] h[i] + terms[i]``, ``h[0] = initial``.

    Args:
        factors: [B, chunks, H], one number for all of a head.
        terms: [B, chunks, H, P, N].
        initial: [B, H, P, N]; None: zeros.

    Returns:
        [B, chunks + 1, H, P, N], of the dtype of `terms`.

    """
    first = terms.new_zeros(terms[:, 0].shape) if initial is None else initial.to(terms.dtype)
    before = torch.cat((first.unsqueeze(1), terms), 1)
    ones = factors.new_ones(factors[:, :1].shape)
    wide = torch.cat((ones, factors), 1).to(terms.dtype)
    return recurrence(wide[..., None, None], before)


@carry_decayed.register_fake
def _(factors: torch.Tensor, terms: torch.Tensor, initial: torch.Tensor | None) -> torch.Tensor:
    rows, chunks, *rest = terms.shape
    return terms.new_empty(rows, chunks + 1, *rest)


@torch.library.custom_op("adaskip::carry_products", mutates_args=())
def carry_products(
    factors: torch.Tensor, terms: torch.Tensor, initial: torch.Tensor | None
) -> torch.Tensor:
    """Return a state before each chunk, and after the last one, where factors are matrices.

    It is ``S[i + 1] = factors[i] @ S[i] + terms[i]``, ``S[0] = initial``: one product for a chunk,
    which is fewer operations than a scan over products of matrices.

    Args:
        factors: [B, H, chunks, K, K].
        terms: [B, H, chunks, K, V].
        initial: [B, H, K, V]; None: zeros.

    Returns:
        [B, H, chunks + 1, K, V], of the dtype of `terms`; chunks are its outermost dimension in
        memory.

    """
    rows, heads, chunks, keys, values = terms.shape
    a, b = factors.flatten(0, 1), terms.flatten(0, 1)
    states = terms.new_empty(chunks + 1, rows * heads, keys, values)
    states[0] = 0 if initial is None else initial.flatten(0, 1)
    for i in range(chunks):
        torch.baddbmm(b[:, i], a[:, i], states[i], out=states[i + 1])
    return states.view(chunks + 1, rows, heads, keys, values).permute(1, 2, 0, 3, 4)


@carry_products.register_fake
def _(factors: torch.Tensor, terms: torch.Tensor, initial: torch.Tensor | None) -> torch.Tensor:
    rows, heads, chunks, keys, values = terms.shape
    return terms.new_empty(chunks + 1, rows, heads, keys, values).permute(1, 2, 0, 3, 4)
