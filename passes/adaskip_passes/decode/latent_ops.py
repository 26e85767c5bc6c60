"""Operators of a decode step on a latent cache: all heads' keys and values are made of one vector.

DeepSeek-V2's multi-head latent attention stores of a token a latent vector c and one rotated key r
for all heads; head h's key is (U_h c, r), and its value V_h c. A step that makes the keys and
values of all stored tokens multiplies every one of them by U and V again. As q . U c = (U' q) . c,
queries are turned into the latent's space instead, and what attention gives is turned back by V:
the stored latents are read once, for all heads (DeepSeek-AI, "DeepSeek-V2", section 2.1.2: W_UK
absorbed into W_Q, and W_UV into W_O).
"""

from __future__ import annotations

import torch

from .ops import Bounds, attend, store
from .rotation import rotate


def into_latent(query: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what queries ask of the latents: ``U_h' q_h`` of each head.

    Args:
        query: [B, H, T, N].
        weight: Of each head U_h and below it V_h, [H * (N + D_v), R].

    Returns:
        [B, H, T, R].

    """
    batch, heads, tokens, dim = query.shape
    rows = query.transpose(0, 1).reshape(heads, batch * tokens, dim)
    asked = torch.bmm(rows, weight.view(heads, -1, weight.shape[1])[:, :dim])
    return asked.view(heads, batch, tokens, -1).transpose(0, 1)


def out_of_latent(mixed: torch.Tensor, weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the heads' values of what they have mixed of the latents: ``V_h c_h``.

    Args:
        mixed: [B, T, H, R].
        weight: As `into_latent`'s.
        dim: How many rows of a head are U_h.

    Returns:
        [B, T, H, D_v], contiguous.

    """
    batch, tokens, heads, rank = mixed.shape
    rows = mixed.permute(2, 0, 1, 3).reshape(heads, batch * tokens, rank)
    values = torch.bmm(rows, weight.view(heads, -1, rank)[:, dim:].transpose(1, 2))
    return values.view(heads, batch, tokens, -1).permute(1, 2, 0, 3).contiguous()


@torch.library.custom_op("adaskip::attend_latent", mutates_args=())
def attend_latent(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotated: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    """Attend as `attend` does, with one K/V head: keys are (latent, rotated), values the latents.

    Args:
        query: [B, H, T, R + D_r].
        latents: [B, 1, room, R]. Only what is seen is read.
        rotated: [B, 1, room, D_r], the rest of the keys.
        bounds: What is seen, int64 [B, 1, 1, 5]; see `Bounds`.
        scale: Of the scores.
        softcap: Their bound; 0 for none.
        sink_scores: Of each head, or None.

    Returns:
        [B, T, H, R], contiguous.

    """
    last = bounds[..., Bounds.END] + bounds[..., Bounds.BASE] + query.shape[2] - 1
    filled = int(last.max())
    latents, rotated = (t[:, :, :filled] for t in (latents, rotated))
    keys = torch.cat((latents, rotated), -1)
    mixed: torch.Tensor = attend(query, keys, latents, bounds, scale, softcap, sink_scores)
    return mixed


@attend_latent.register_fake
def _(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotated: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, latents.shape[3]))


@torch.library.custom_op("adaskip::store_and_attend_latent", mutates_args=("latents", "rotated"))
def store_and_attend_latent(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotated: torch.Tensor,
    new_latents: torch.Tensor,
    new_rotated: torch.Tensor,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
    interleaved: bool = False,
    unzipped: bool = False,
) -> torch.Tensor:
    """Store the queries' own tokens where they belong, and `attend_latent`.

    The last D_r numbers of queries, and new rests, may be rotated before: see `rotation.rotate`.

    Args:
        query: [B, H, T, R + D_r].
        latents: Like `attend_latent`'s; token t's is written at its position, ``END - 1 + t``.
        rotated: Likewise.
        new_latents: [B, 1, T, R].
        new_rotated: [B, 1, T, D_r].
        cosines: Of the angles, [B or 1, 1, T, D_r], or [..., D_r / 2] for the pairs; None: nothing
            is rotated.
        sines: Likewise.
        bounds: As of `attend_latent`.
        scale: Of the scores.
        softcap: Their bound; 0 for none.
        sink_scores: Of each head, or None.
        interleaved: Whether neighbours are pairs, and not halves of the D_r.
        unzipped: Whether neighbours are put into halves then.

    Returns:
        [B, T, H, R], contiguous.

    """
    if cosines is not None and sines is not None:
        own, rest = query.tensor_split([latents.shape[3]], -1)
        kind = cosines, sines, 0, interleaved, unzipped
        rest, new_rotated = rotate(rest, *kind), rotate(new_rotated, *kind)
        query = torch.cat((own, rest), -1)
    slots = bounds[:, 0, 0, Bounds.END] - 1 + bounds[:, 0, 0, Bounds.BASE]
    store(latents, new_latents, slots)
    store(rotated, new_rotated, slots)
    mixed: torch.Tensor = attend_latent(
        query, latents, rotated, bounds, scale, softcap, sink_scores
    )
    return mixed


@store_and_attend_latent.register_fake
def _(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotated: torch.Tensor,
    new_latents: torch.Tensor,
    new_rotated: torch.Tensor,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
    interleaved: bool = False,
    unzipped: bool = False,
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, latents.shape[3]))
