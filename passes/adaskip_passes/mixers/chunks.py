"""A prompt cut into chunks of equal length, and one more of padding.

Where a length is symbolic nothing is asked of it then: there are two chunks at least, and some
padding always, so that one graph is right for every length.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

__all__ = ["chunked"]


def chunked(x: torch.Tensor, chunk: int, dim: int) -> torch.Tensor:
    """Return [..., T, ...] as [..., chunks, chunk, ...], zeros behind the last token.

    Args:
        x: Some tensor.
        chunk: Tokens of a chunk.
        dim: Its dimension of tokens, from the front.
    """
    tokens = x.shape[dim]
    count = (tokens + chunk - 1) // chunk + 1
    behind = [0] * (2 * (x.dim() - dim - 1)) + [0, count * chunk - tokens]
    return torch.unflatten(pad(x, behind), dim, (count, chunk))
