"""Rows that are sorted by expert: their tokens', their gates, and sums of a token's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...decode.triton_kernels.expert_parts import gated
from ...infra.launch import Launch

_BLOCK = 1024  # numbers that a program writes at most


@triton.jit
def gather_rows(hidden, order, out, N: tl.constexpr, COUNT: tl.constexpr, BN: tl.constexpr):
    """BN numbers of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    token = tl.load(order + row) // COUNT
    value = tl.load(hidden + token * N + cols, mask=cols < N, other=0.0)
    tl.store(out + row * N + cols, value, mask=cols < N)


@triton.jit
def gate_rows(
    both, bias, experts, out, clamp, alpha,
    N: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMPED: tl.constexpr, BIAS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """BN gated numbers of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = cols < N
    both += row * (2 * N)
    if BIAS:
        bias += tl.load(experts + row).to(tl.int64) * (2 * N)
    if INTERLEAVED:
        pairs = tl.program_id(1) * 2 * BN + tl.arange(0, 2 * BN)
        mixed = tl.load(both + pairs, mask=pairs < 2 * N, other=0.0).to(tl.float32)
        if BIAS:
            mixed += tl.load(bias + pairs, mask=pairs < 2 * N, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(mixed, [BN, 2]))
    else:
        gate = tl.load(both + cols, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(both + N + cols, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            gate += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
            up += tl.load(bias + N + cols, mask=inside, other=0.0).to(tl.float32)
    result = gated(gate, up, clamp, alpha, CLAMPED)
    tl.store(out + row * N + cols, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_rows(
    outputs, places, chosen, shares, bias, out,
    N: tl.constexpr, COUNT: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN numbers of a token a program."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = cols < N
    total = tl.zeros([BN], tl.float32)
    for j in tl.static_range(COUNT):
        pair = token * COUNT + j
        row = tl.load(outputs + tl.load(places + pair) * N + cols, mask=inside, other=0.0)
        row = row.to(tl.float32)
        if BIAS:
            at = bias + tl.load(chosen + pair) * N + cols
            row += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        total += row * tl.load(shares + pair).to(tl.float32)
    tl.store(out + token * N + cols, total.to(out.dtype.element_ty), mask=inside)


def gathering(hidden: torch.Tensor, order: torch.Tensor, count: int) -> Launch:
    """Return the launch of :func:`ops.gather_grouped`, which describes the inputs."""
    rows, width = order.shape[0], hidden.shape[1]
    out = hidden.new_empty((rows, width))
    block = min(_BLOCK, triton.next_power_of_2(width))
    flags = {"N": width, "COUNT": count, "BN": block, "num_warps": _warps(block)}
    grid = rows, triton.cdiv(width, block)
    return Launch(gather_rows, grid, (hidden.contiguous(), order, out), flags, [out])


def gates(
    both: torch.Tensor,
    bias: torch.Tensor | None,
    experts: torch.Tensor,
    interleaved: bool,
    clamp: float,
    alpha: float,
) -> Launch:
    """Return the launch of :func:`ops.gate_grouped`, which describes the inputs."""
    rows, inner = both.shape[0], both.shape[1] // 2
    out = both.new_empty((rows, inner))
    block = min(_BLOCK, triton.next_power_of_2(inner))
    flags = {
        **{"N": inner, "INTERLEAVED": interleaved, "CLAMPED": clamp != 0},
        **{"BIAS": bias is not None, "BN": block, "num_warps": _warps(block)},
    }
    arguments = both.contiguous(), both if bias is None else bias, experts, out, clamp, alpha
    return Launch(gate_rows, (rows, triton.cdiv(inner, block)), arguments, flags, [out])


def sums(
    outputs: torch.Tensor,
    places: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    bias: torch.Tensor | None,
) -> Launch:
    """Return the launch of :func:`ops.sum_grouped`, which describes the inputs."""
    (tokens, count), width = places.shape, outputs.shape[1]
    out = outputs.new_empty((tokens, width))
    block = min(_BLOCK, triton.next_power_of_2(width))
    flags = {
        **{"N": width, "COUNT": count, "BIAS": bias is not None},
        **{"BN": block, "num_warps": _warps(block)},
    }
    tables = (t.contiguous() for t in (places, chosen, shares))
    arguments = (outputs.contiguous(), *tables, outputs if bias is None else bias, out)
    return Launch(sum_rows, (tokens, triton.cdiv(width, block)), arguments, flags, [out])


def _warps(block: int) -> int:
    """Return warps whose threads have 16 bytes of two-byte numbers each."""
    return max(1, block // 256)
