"""The gated delta rule over a prompt, in chunks (Gated DeltaNet, Kimi Delta Attention).

A state S [K, V] decays, forgets what it says for a key, and learns a value in its place:
``S <- exp(g) S``, ``S <- S + k beta (v - k^T S)^T``, ``o = S^T q``. Within a chunk all corrections
are one triangular system (the UT transform; Yang et al., "Gated Delta Networks", arXiv 2412.06464,
section 3.3); from chunk to chunk the state is multiplied by a matrix.
"""

from __future__ import annotations

import torch

from .carry import carry_products
from .chunks import chunked

__all__ = ["gated_delta_rule"]


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    initial: torch.Tensor | None,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a prompt reads of its states, and the last state.

    Args:
        query: [B, T, H, K], scaled.
        key: [B, T, H, K].
        value: [B, T, H, V].
        decay: Logarithms, at most 0: [B, T, H], or [B, T, H, K] where each channel has its own.
        beta: [B, T, H].
        initial: The state before, [B, H, K, V]; None: zeros.
        chunk: Tokens of a chunk.

    Returns:
        [B, T, H, V] and [B, H, K, V], both of the dtype of `value`.

    """
    tokens, by_channel = value.shape[1], decay.dim() == 4
    q, k, v, kb, vb, g = (
        chunked(x.transpose(1, 2), chunk, 2)
        for x in (
            *(query, key, value),
            *(key * beta.unsqueeze(-1), value * beta.unsqueeze(-1)),
            decay if by_channel else decay.unsqueeze(-1),
        )
    )
    total = g.cumsum(-2)  # [B, H, chunks, chunk, K or 1]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    between = total.unsqueeze(-2) - total.unsqueeze(-3)  # from j to i, [..., i, j, K or 1]
    between = between.masked_fill(later.unsqueeze(-1), float("-inf")).exp()
    if by_channel:
        system = (kb.unsqueeze(-2) * k.unsqueeze(-3) * between).sum(-1)
        within = (q.unsqueeze(-2) * k.unsqueeze(-3) * between).sum(-1)
    else:
        system = kb @ k.transpose(-1, -2) * between.squeeze(-1)
        within = q @ k.transpose(-1, -2) * between.squeeze(-1)
    known = torch.cat((vb, kb * total.exp()), -1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    new, old = solved.split((v.shape[-1], k.shape[-1]), -1)
    end = total[..., -1:, :]
    out = (k * (end - total).exp()).transpose(-1, -2)  # keys, as the end of the chunk sees them
    kept = torch.diag_embed(end.exp().squeeze(-2).expand(*k.shape[:3], k.shape[-1]))
    states = carry_products(kept - out @ old, out @ new, initial)
    before = states[:, :, :-1]
    read = (q * total.exp()) @ before + within @ (new - old @ before)
    return read.flatten(2, 3)[:, :, :tokens].transpose(1, 2), states[:, :, -1]
