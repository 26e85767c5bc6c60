"""Rotary position embeddings as the operators of a decode step compute them, in plain torch."""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    rotary_dim: int = 0,
    interleaved: bool = False,
    unzipped: bool = False,
) -> torch.Tensor:
    """Rotate heads (Su et al., "RoFormer", eq. 34), in float32 or what is wider.

    Args:
        x: [B, H, T, D].
        cosines: Of the angles, [B or 1, 1, T, R], or [..., R / 2] for the pairs.
        sines: Likewise.
        rotary_dim: R, how many of a head's first numbers are rotated; 0: all.
        interleaved: Whether neighbours are pairs (GPT-J), and not halves of the R (GPT-NeoX).
        unzipped: Whether neighbours are put into halves then (DeepSeek-V3).

    Returns:
        [B, H, T, D], of x's dtype.

    """
    dim = rotary_dim or x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    part = x[..., :dim].to(wide)
    if cosines.shape[-1] != dim:  # of the pairs
        cosines, sines = (_of_each_number(t, interleaved) for t in (cosines, sines))
    if interleaved:
        pairs = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        first, second = part.chunk(2, -1)
        pairs = torch.cat((-second, first), -1)
    turned = (part * cosines.to(wide) + pairs * sines.to(wide)).to(x.dtype)
    if unzipped:
        turned = torch.cat((turned[..., ::2], turned[..., 1::2]), -1)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), -1)


def _of_each_number(angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    return angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
