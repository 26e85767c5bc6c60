"""The operators of :mod:`ops` on CUDA: Triton's kernels, which are imported at their first use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from .ops import attend, project

_counters: ContextVar[torch.Tensor | None] = ContextVar("counters", default=None)
_COUNTERS = 4096  # K/V heads times rows that attention may count splits for


@project.register_kernel("cuda")
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    norm: torch.Tensor | None,
    eps: float,
    activation: str,
    residual: torch.Tensor | None,
) -> list[torch.Tensor]:
    from . import triton_kernels

    return triton_kernels.project(x, weights, biases, norm, eps, activation, residual)


@attend.register_kernel("cuda")
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    filled: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    from . import triton_kernels

    needed = keys.shape[0] * keys.shape[1]
    counters = _counters.get()
    if counters is None or counters.numel() < needed:
        counters = torch.zeros(needed, dtype=torch.int32, device=query.device)
    return triton_kernels.attend(query, keys, values, filled, scale, counters)


@contextlib.contextmanager
def shared_counters(device: torch.device) -> Iterator[None]:
    """Share one set of zeroed counters among the `attend` calls inside, which leave them zero.

    For a sequence of calls on one stream, such as a captured graph: it saves a memset for each.
    """
    token = _counters.set(torch.zeros(_COUNTERS, dtype=torch.int32, device=device))
    try:
        yield
    finally:
        _counters.reset(token)
