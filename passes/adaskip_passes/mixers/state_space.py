"""State-space models over a prompt: Mamba 2 in chunks, and Mamba's scan.

A state h [P, N] of a head decays and takes something in: ``h <- exp(dt A) h + dt x B^T``,
``y = h C``. Where all of a head decays alike (Mamba 2) a chunk is a masked matrix product, as
attention is (Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 6). Where each number
of a state decays by itself (Mamba; Gu and Dao, arXiv 2312.00752) there is nothing to multiply, and
the recurrence is computed in blocks.
"""

from __future__ import annotations

import torch

from ..tracing.linear_scan import recurrence
from .carry import carry_decayed
from .chunks import chunked

__all__ = ["scan_in_chunks", "selective_scan"]

#: Numbers of all states that are held at once: some MiB of a CPU's cache, or 1 GiB of a GPU.
_AT_ONCE = {"cpu": 2**21, "cuda": 2**28}


def scan_in_chunks(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    initial: torch.Tensor | None,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a prompt reads of Mamba 2's states, and the last state.

    Args:
        x: [B, T, H, P].
        dt: Steps, at least 0, [B, T, H].
        a: Negative, [H].
        b: [B, T, G, N]; a group of heads, one after the other, has the same.
        c: [B, T, G, N].
        initial: The state before, [B, H, P, N]; None: zeros.
        chunk: Tokens of a chunk.

    Returns:
        [B, T, H, P] and [B, H, P, N], both of the dtype of `x`.

    """
    rows, tokens, heads, width = x.shape
    groups, size = b.shape[2:]
    shape = groups, heads // groups
    # sums of many steps lose bits that a difference of two of them needs
    total = chunked((dt * a).double(), chunk, 1).cumsum(2).permute(0, 1, 3, 2)  # [B, c, H, l]
    taken = chunked(x * dt.unsqueeze(-1), chunk, 1).permute(0, 1, 3, 2, 4)  # [B, c, H, l, P]
    b, c = (chunked(t, chunk, 1).transpose(2, 3) for t in (b, c))  # [B, c, G, l, N]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(x.dtype)
    between = torch.unflatten(between.masked_fill(later, float("-inf")).exp(), 2, shape)
    scores = (c @ b.transpose(-1, -2)).unsqueeze(3)  # [B, c, G, 1, l, l]
    within = (scores * between) @ torch.unflatten(taken, 2, shape)  # [B, c, G, H/G, l, P]
    end = total[..., -1:]
    left = taken * (end - total).to(x.dtype).exp().unsqueeze(-1)
    left = torch.unflatten(left, 2, shape).transpose(-1, -2).flatten(3, 4)  # [B, c, G, H/G P, l]
    terms = torch.unflatten(left @ b, 3, (-1, width)).flatten(2, 3)  # [B, c, H, P, N]
    states = carry_decayed(end.squeeze(-1).to(x.dtype).exp(), terms, initial)
    before = states[:, :-1].reshape(rows, -1, groups, shape[1] * width, size)
    read = torch.unflatten(c @ before.transpose(-1, -2), -1, (-1, width)).transpose(3, 4)
    result = within + read * torch.unflatten(total.to(x.dtype).exp(), 2, shape).unsqueeze(-1)
    result = result.permute(0, 1, 4, 2, 3, 5).reshape(rows, -1, heads, width)
    return result[:, :tokens], states[:, -1]


@torch.library.custom_op("adaskip::selective_scan", mutates_args=())
def selective_scan(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a prompt reads of Mamba's states, and the last state.

    As many tokens are worked on at once as leave room for their states.

    Args:
        x: [B, D, T].
        dt: Steps, at least 0, [B, D, T].
        a: Negative, [D, N].
        b: [B, N, T].
        c: [B, N, T].

    Returns:
        [B, D, T] and [B, D, N], both of the dtype of `a`; tokens are the outer dimension of the
        first in memory.

    """
    rows, width, tokens = x.shape
    read = a.new_empty(rows, tokens, width)
    state = a.new_zeros(rows, width, a.shape[1])
    most = _AT_ONCE.get(x.device.type, 2**24) // max(1, state.numel())
    for begin in range(0, tokens, max(16, most)):
        part = slice(begin, begin + max(16, most))
        step = dt[..., part].to(a.dtype).transpose(1, 2).unsqueeze(-1)  # [B, t, D, 1]
        taken = step * x[..., part].to(a.dtype).transpose(1, 2).unsqueeze(-1)
        terms = taken * b[..., part].to(a.dtype).transpose(1, 2).unsqueeze(2)
        factors = torch.exp(step * a)
        terms[:, 0].addcmul_(factors[:, 0], state)
        states = recurrence(factors, terms)  # [B, t, D, N]
        seen = c[..., part].to(a.dtype).transpose(1, 2).unsqueeze(-1)
        read[:, part] = (states @ seen).squeeze(-1)
        state = states[:, -1].clone()
    return read.transpose(1, 2), state


@selective_scan.register_fake
def _(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width, tokens = x.shape
    read = a.new_empty(rows, tokens, width).transpose(1, 2)
    return read, a.new_empty(rows, width, a.shape[1])
