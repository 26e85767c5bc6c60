"""The operators of :mod:`ops` and :mod:`expert_ops` on CUDA, by Triton; imported at first use."""

from __future__ import annotations

from typing import Any

import torch

from .expert_ops import choose_experts, run_experts
from .latent_ops import attend_latent, store_and_attend_latent
from .ops import attend, store_and_attend
from .projection_ops import normalize, project
from .rank_sums import MOST_NUMBERS, all_reduced, sum_over_ranks
from .router_ops import choose_in_groups
from .shared_memory import shared_memory


@project.register_kernel("cuda")
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    norm: torch.Tensor | None,
    eps: float,
    activation: str,
    residual: torch.Tensor | None,
    offset: float = 0.0,
    shift: torch.Tensor | None = None,
    centered: bool = False,
    factors: list[float] | None = None,
    wide: bool = False,
) -> list[torch.Tensor]:
    from . import triton_kernels

    around = norm, eps, activation, residual, offset, shift, centered, factors
    return triton_kernels.project(x, weights, biases, *around, wide)


@normalize.register_kernel("cuda")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    shift: torch.Tensor | None = None,
    centered: bool = False,
) -> torch.Tensor:
    from . import triton_kernels

    return triton_kernels.normalize(x, weight, eps, offset, shift, centered)


@sum_over_ranks.register_kernel("cuda")
def _(x: torch.Tensor, residual: torch.Tensor | None, group: str) -> torch.Tensor:
    shared = shared_memory(group, x.device) if x.numel() <= MOST_NUMBERS else None
    if shared is None:
        return all_reduced(x, residual, group)
    from . import triton_kernels

    return triton_kernels.rank_sum(x, residual, shared).run()[0]


@run_experts.register_kernel("cuda")
def _(
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    transposed: bool,
    interleaved: bool,
    clamp: float,
    alpha: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    from . import triton_kernels

    weights = up, down, up_bias, down_bias
    kind = transposed, interleaved, clamp, alpha
    return triton_kernels.run_experts(hidden, chosen, shares, *weights, *kind, residual)


@choose_experts.register_kernel("cuda")
def _(
    scores: torch.Tensor, count: int, softmax: bool, after: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    from . import triton_kernels

    return triton_kernels.choose_experts(scores, count, softmax, after, dtype)


@choose_in_groups.register_kernel("cuda")
def _(
    logits: torch.Tensor,
    bias: torch.Tensor,
    count: int,
    groups: int,
    kept: int,
    share: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from . import triton_kernels

    how = count, groups, kept, share, factor
    values, places = triton_kernels.choice_in_groups(logits, bias, *how).run()
    return values, places


@attend.register_kernel("cuda")
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    nothing_new = None, None, None, None
    return _attend(query, keys, values, *nothing_new, bounds, scale, softcap, sink_scores)


@store_and_attend.register_kernel("cuda")
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
    rotary_dim: int = 0,
    interleaved: bool = False,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> torch.Tensor:
    new = new_keys, new_values, cosines, sines
    rest = bounds, scale, softcap, sink_scores, rotary_dim, interleaved
    norms = query_norm, key_norm, eps, offset
    return _attend(query, keys, values, *new, *rest, False, *norms)


@attend_latent.register_kernel("cuda")
def _(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotated: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    rest = None, None, None, None, bounds, scale, softcap, sink_scores
    return _attend(query, latents, rotated, *rest, latent=True)


@store_and_attend_latent.register_kernel("cuda")
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
    new = new_latents, new_rotated, cosines, sines
    rest = bounds, scale, softcap, sink_scores, 0, interleaved, unzipped
    return _attend(query, latents, rotated, *new, *rest, latent=True)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *rest: Any, latent: bool = False
) -> torch.Tensor:
    from . import triton_kernels

    return triton_kernels.attend(query, keys, values, *rest, latent=latent)
