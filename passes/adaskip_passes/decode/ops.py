"""Operators of a decode step: what the compiler would launch as many kernels, in one.

A step of one token per row reads every weight once, so its time is the time of reading; what a
kernel for each norm, projection, activation and add costs besides is most of what is left to gain.
These operators say what is computed; the reference implementations here say how, in plain torch,
and run on every device; on CUDA :mod:`cuda_kernels` takes their place.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

MAX_ROWS = 16  # of a step: rows of the batch that one kernel takes


@torch.library.custom_op("adaskip::project", mutates_args=())
def project(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    norm: torch.Tensor | None,
    eps: float,
    activation: str,
    residual: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Compute ``y_i = rms_norm(x) @ weights[i].T + biases[i]``, of one input with several weights.

    Args:
        x: [..., K], at most `MAX_ROWS` rows in all.
        weights: [N_i, K], contiguous.
        biases: [N_i] each; empty when there are none.
        norm: weight of the RMS norm before it, [K]; None: no norm.
        eps: of the norm.
        activation: ``"silu"`` returns ``silu(y_0) * y_1`` alone; empty: all ``y_i``.
        residual: added to the one result; None: nothing.
    """
    if norm is not None:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        x = norm * (wide * scale).to(x.dtype)
    outputs = [linear(x, w, biases[i] if biases else None) for i, w in enumerate(weights)]
    if activation:
        outputs = [silu(outputs[0]) * outputs[1]]
    return outputs if residual is None else [outputs[0] + residual]


@project.register_fake
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    norm: torch.Tensor | None,
    eps: float,
    activation: str,
    residual: torch.Tensor | None,
) -> list[torch.Tensor]:
    kept = weights[:1] if activation else weights
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in kept]


@torch.library.custom_op("adaskip::attend", mutates_args=())
def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    filled: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend with one query per row to the filled part of a cache; K/V heads are not repeated.

    Args:
        query: [B, H, 1, D].
        keys: [B, H_kv, capacity, D]; H is a multiple of H_kv.
        values: Like `keys`.
        filled: How many of the cache's tokens count, one integer on the device; never read by the
            host on CUDA, so a captured graph serves every length.
        scale: Of the scores.

    Returns:
        [B, 1, H, D], contiguous.

    """
    length = int(filled.item())
    output = scaled_dot_product_attention(
        query,
        keys.narrow(2, 0, length),
        values.narrow(2, 0, length),
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return output.transpose(1, 2).contiguous()


@attend.register_fake
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    filled: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    batch, heads, tokens, dim = query.shape
    return query.new_empty((batch, tokens, heads, dim))
