"""Mixers with a state as they are traced: their prompts in chunks, good for every length.

transformers computes a prompt of a delta rule in a loop over chunks, which tracing writes out: the
graph would be good for one number of chunks. Mamba's scan on a GPU is a loop over tokens wherever
nothing compiles it. While a model is traced, its own modules' functions for prompts are those here,
which compute the same. On a GPU where flash-linear-attention or mamba-ssm is installed, they call
its kernels in one operator. Steps of one token, and convolutions, are traced as transformers writes
them in torch, also where it would call a kernel of another library, which Dynamo cannot see into.

A function that a user put in the place of transformers' is traced as it is.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.functional import softplus

from adaskip_passes.mixers import other_kernels
from adaskip_passes.mixers.delta_rule import gated_delta_rule
from adaskip_passes.mixers.state_space import scan_in_chunks, selective_scan

from ..utils.kernel_functions import kernel_or_torch

_CHUNK = 64
#: Channels that decay by themselves need all of a chunk's decays at once, which is 4 times fewer.
_CHUNK_BY_CHANNEL = 16
_CHUNK_OF_STATES = 128


@contextmanager
def exchanged(model: nn.Module) -> Iterator[None]:
    """Have the functions of a model's modules be the ones to trace."""
    with ExitStack() as stack:
        names = dict.fromkeys(type(m).__module__ for m in model.modules())
        for name in names:
            if not name.startswith("transformers.models."):
                continue
            module = sys.modules[name]
            for known, ours in _exchanges(module).items():
                stack.enter_context(patch.object(module, known, ours))
        yield


def _exchanges(module: types.ModuleType) -> dict[str, Callable[..., Any]]:
    """Return what to read instead of the functions of a module of transformers', by name."""
    found: dict[str, Callable[..., Any]] = {}
    for name, value in vars(module).items():
        form = kernel_or_torch(value)
        if form is None or form.written.__module__ != module.__name__:
            continue
        if name in _PROMPTS:
            found[name] = _PROMPTS[name]
        elif form.has_kernel:
            found[name] = form.written
    return found


def _delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Do what transformers' functions of chunks do, which are called as FLA's.

    Args:
        query: [B, T, H', K]; H' heads, each of which serves as many of `value`.
        key: [B, T, H', K].
        value: [B, T, H, V].
        g: Logarithms of decays, [B, T, H], or [B, T, H, K].
        beta: [B, T, H].
        initial_state: [B, H, K, V].
        output_final_state: Whether the last state is returned, and not None.
        use_qk_l2norm_in_kernel: Whether queries and keys are to be of length 1.
        cu_seqlens: Not known here.
        **kwargs: Of no meaning to transformers' functions either.

    Returns:
        [B, T, H, V] of the dtype of `query`, and the state [B, H, K, V].

    """
    if cu_seqlens is not None:
        raise NotImplementedError("a mixer's packed rows")
    if other_kernels.delta_rule_is_installed(query.device):
        with_kernel: tuple[torch.Tensor, torch.Tensor] = other_kernels.fla_delta_rule(
            query, key, value, g, beta, initial_state, use_qk_l2norm_in_kernel
        )
        return with_kernel
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    repeats = value.shape[2] // key.shape[2]
    query, key = (
        t.to(wide).repeat_interleave(repeats, dim=2, output_size=value.shape[2])
        if repeats > 1
        else t.to(wide)
        for t in (query, key)
    )
    if use_qk_l2norm_in_kernel:
        query, key = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (query, key))
    output, state = gated_delta_rule(
        query * query.shape[-1] ** -0.5,
        key,
        value.to(wide),
        g.to(wide),
        beta.to(wide),
        initial_state,
        _CHUNK_BY_CHANNEL if g.dim() == 4 else _CHUNK,
    )
    return output.to(dtype).contiguous(), state if output_final_state else None


def _scan_in_chunks(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    seq_idx: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Do what transformers' ``mamba2_chunk_scan`` does, which is called as mamba-ssm's.

    Args:
        hidden_states: [B, T, H, P].
        dt: [B, T, H].
        A: [H].
        B: [B, T, G, N].
        C: [B, T, G, N].
        chunk_size: Tokens of a chunk; at most as many are.
        D: [H]; None: nothing of the inputs is added.
        dt_bias: [H].
        initial_states: [B, H, P, N].
        dt_softplus: Whether steps are the softplus of `dt`.
        dt_limit: What they are at least and at most.
        return_final_states: Whether the last state is returned as well.
        seq_idx: Not known here.
        **kwargs: Of no meaning to transformers' function either.

    Returns:
        [B, T, H, P] in float32, and the state [B, H, P, N].

    """
    if seq_idx is not None:
        raise NotImplementedError("a mixer's packed rows")
    if other_kernels.chunk_scan_is_installed(hidden_states.device):
        least, most = float(dt_limit[0]), float(dt_limit[1])
        result = other_kernels.mamba_ssm_chunk_scan(
            *(hidden_states, dt, A, B, C, chunk_size, D, dt_bias, initial_states),
            *(dt_softplus, least, most),
        )
        return result if return_final_states else result[0]
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    x, step, a, b, c = (t.to(wide) for t in (hidden_states, dt, A, B, C))
    chunk = min(chunk_size, _CHUNK_OF_STATES)
    output, state = scan_in_chunks(x, step, a, b, c, initial_states, chunk)
    if D is not None:
        output = output + D[..., None] * x
    output = output.contiguous()
    return (output, state) if return_final_states else output


def _selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> Any:
    """Do what transformers' ``mamba_selective_scan`` does, which is called as mamba-ssm's.

    Args:
        hidden_states: [B, D, T].
        dt: [B, D, T].
        A: [D, N].
        B: [B, N, T].
        C: [B, N, T].
        D: [D]; None: nothing of the inputs is added.
        z: Gates [B, D, T], or None.
        delta_bias: [D].
        delta_softplus: Whether steps are the softplus of `dt`.
        return_last_state: Whether the last state is returned as well.
        **kwargs: Which of its ways transformers' function is to go.

    Returns:
        [B, D, T], and the state [B, D, N].

    """
    if other_kernels.selective_scan_is_installed(hidden_states.device):
        result = other_kernels.mamba_ssm_selective_scan(
            hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus
        )
        return result if return_last_state else result[0]
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = softplus(dt)
    output, state = selective_scan(hidden_states, dt, A, B, C)
    if D is not None:
        output = output + hidden_states * D[None, :, None]
    if z is not None:
        output = output * torch.nn.functional.silu(z)
    return (output, state) if return_last_state else output


#: By the names that transformers has since 5.17 for its functions of prompts.
_PROMPTS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _scan_in_chunks,
    "mamba_selective_scan": _selective_scan,
}
