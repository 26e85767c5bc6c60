"""Kernels of other libraries for mixers' prompts, each as one operator; none of them is needed.

They are flash-linear-attention's (``fla``) of delta rules and mamba-ssm's of state-space models. As
they are, Dynamo does not see into them, and a model that calls them would not be one graph.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "chunk_scan_is_installed",
    "delta_rule_is_installed",
    "fla_delta_rule",
    "mamba_ssm_chunk_scan",
    "mamba_ssm_selective_scan",
    "selective_scan_is_installed",
]

_DELTA_RULE = "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"
_BY_CHANNEL = "fla.ops.kda", "chunk_kda"
_CHUNK_SCAN = "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"
_SELECTIVE_SCAN = "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"


@functools.cache
def _found(module: str, name: str) -> Callable[..., Any] | None:
    """Return a library's function; None where it is not installed, or not for this machine."""
    try:
        function: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    except Exception:  # what such a library needs may be missing in many ways
        return None
    return function


def _installed(device: torch.device, *kernels: tuple[str, str]) -> bool:
    return device.type == "cuda" and all(_found(*kernel) is not None for kernel in kernels)


def _kernel(kernel: tuple[str, str]) -> Callable[..., Any]:
    function = _found(*kernel)
    if function is None:
        raise RuntimeError(
            f"{'.'.join(kernel)} was there when the model was captured and is not now; install "
            "its library again, or compile the model again"
        )
    return function


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def delta_rule_is_installed(device: torch.device) -> bool:
    """Return whether flash-linear-attention's delta rules can be had for a device.

    A trace asks for the answer and does not look inside, where Dynamo could not follow an import.
    """
    return _installed(device, _DELTA_RULE, _BY_CHANNEL)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def chunk_scan_is_installed(device: torch.device) -> bool:
    """Return whether mamba-ssm's scan of Mamba 2 can be had for a device."""
    return _installed(device, _CHUNK_SCAN)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def selective_scan_is_installed(device: torch.device) -> bool:
    """Return whether mamba-ssm's scan of Mamba can be had for a device."""
    return _installed(device, _SELECTIVE_SCAN)


@torch.library.custom_op("adaskip::fla_delta_rule", mutates_args=())
def fla_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    initial: torch.Tensor | None,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `gated_delta_rule` does, by flash-linear-attention.

    Args:
        query: [B, T, H', K], not scaled; each of H' heads serves as many of `value`.
        key: [B, T, H', K].
        value: [B, T, H, V].
        decay: Logarithms, [B, T, H], or [B, T, H, K].
        beta: [B, T, H].
        initial: [B, H, K, V]; None: zeros.
        normalize: Whether queries and keys are to be of length 1.

    Returns:
        [B, T, H, V] of the dtype of `query`, and [B, H, K, V] in float32.

    Raises:
        RuntimeError: the library is not installed.

    """
    output, state = _kernel(_BY_CHANNEL if decay.dim() == 4 else _DELTA_RULE)(
        *(query, key, value),
        g=decay,
        beta=beta,
        initial_state=initial,
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalize,
    )
    return output.to(query.dtype).contiguous(), _apart(state, initial)


@fla_delta_rule.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    initial: torch.Tensor | None,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, _, heads, width = value.shape
    state = query.new_empty(rows, heads, key.shape[3], width, dtype=torch.float32)
    return query.new_empty(value.shape), state


@torch.library.custom_op("adaskip::mamba_ssm_chunk_scan", mutates_args=())
def mamba_ssm_chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    chunk: int,
    skip: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    softplus: bool,
    least: float,
    most: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `scan_in_chunks` does, by mamba-ssm, and what it does with steps and inputs.

    Args:
        x: [B, T, H, P].
        dt: [B, T, H].
        a: [H].
        b: [B, T, G, N].
        c: [B, T, G, N].
        chunk: Tokens of a chunk.
        skip: How much of the inputs is added, [H].
        bias: Added to `dt`, [H].
        initial: [B, H, P, N]; None: zeros.
        softplus: Whether steps are the softplus of `dt`.
        least: What a step is at least.
        most: What a step is at most.

    Returns:
        [B, T, H, P] of the dtype of `x`, and [B, H, P, N] in float32.

    Raises:
        RuntimeError: the library is not installed.

    """
    output, state = _kernel(_CHUNK_SCAN)(
        *(x, dt, a, b, c, chunk),
        D=skip,
        z=None,
        dt_bias=bias,
        initial_states=initial,
        dt_softplus=softplus,
        dt_limit=(least, most),
        return_final_states=True,
    )
    return output.to(x.dtype).contiguous(), _apart(state, initial)


@mamba_ssm_chunk_scan.register_fake
def _(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    chunk: int,
    skip: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    softplus: bool,
    least: float,
    most: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, _, heads, width = x.shape
    state = x.new_empty(rows, heads, width, b.shape[3], dtype=torch.float32)
    return x.new_empty(x.shape), state


@torch.library.custom_op("adaskip::mamba_ssm_selective_scan", mutates_args=())
def mamba_ssm_selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None,
    gate: torch.Tensor | None,
    bias: torch.Tensor | None,
    softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `selective_scan` does, by mamba-ssm, and what it does with steps and inputs.

    Args:
        x: [B, D, T].
        dt: [B, D, T].
        a: [D, N].
        b: [B, N, T].
        c: [B, N, T].
        skip: How much of the inputs is added, [D].
        gate: [B, D, T]; its SiLU is multiplied with what is read.
        bias: Added to `dt`, [D].
        softplus: Whether steps are the softplus of `dt`.

    Returns:
        [B, D, T] of the dtype of `x`, and [B, D, N] in float32.

    Raises:
        RuntimeError: the library is not installed.

    """
    output, state = _kernel(_SELECTIVE_SCAN)(
        *(x, dt, a, b, c, skip),
        z=gate,
        delta_bias=bias,
        delta_softplus=softplus,
        return_last_state=True,
    )
    return output.to(x.dtype).contiguous(), _apart(state, None)


@mamba_ssm_selective_scan.register_fake
def _(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None,
    gate: torch.Tensor | None,
    bias: torch.Tensor | None,
    softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width, _ = x.shape
    state = x.new_empty(rows, width, a.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), state


def _apart(state: torch.Tensor, initial: torch.Tensor | None) -> torch.Tensor:
    """Return a state in float32, in memory of its own: an operator must not return its input."""
    state = state.float().contiguous()
    return (
        state.clone() if initial is not None and state.data_ptr() == initial.data_ptr() else state
    )
