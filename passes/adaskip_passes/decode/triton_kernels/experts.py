"""Launches of the kernels of a mixture of experts: ``expert_ops``."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from ...infra.launch import Launch, has_pdl
from .expert_parts import combine
from .expert_row import down_row, down_row_transposed, up_row
from .expert_rows import down_rows, up_rows
from .router import choose, choose_by_group

#: Programs that keep a GPU's memory busy, each with a few kilobytes on their way.
_PROGRAMS = 400


def run_experts(*inputs: Any) -> torch.Tensor:
    """Compute :func:`expert_ops.run_experts`, which describes the inputs."""
    for launch in (launches := expert_launches(*inputs)):
        launch.run()
    return launches[-1].outputs[0]


def choose_experts(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`expert_ops.choose_experts`, which describes the inputs."""
    values, places = choice(*inputs).run()
    return values, places


def expert_launches(
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
) -> list[Launch]:
    """Return the launches of :func:`expert_ops.run_experts`; the last one has the result."""
    tokens, width = hidden.shape
    count = chosen.shape[1]
    inner = up.shape[-1 if transposed else 1] // 2
    chosen, shares = chosen.contiguous(), shares.contiguous()
    y = hidden.new_empty((tokens * count, inner))
    inputs = (hidden.contiguous(), chosen, up, up_bias if up_bias is not None else up, y)
    flags: dict[str, Any] = {"N": inner, "K": width, "E": up.shape[0], **_pdl(hidden.device)}
    flags |= {"TRANSPOSED": transposed, "INTERLEAVED": interleaved, "CLAMPED": clamp != 0}
    flags |= {"BIAS": up_bias is not None}
    if tokens == 1:
        blocks = _transposed_blocks() if transposed else _up_blocks(width)
        if transposed and interleaved:  # gates and ups are side by side
            blocks |= {"BN": blocks["BN"] // 2, "num_warps": 8}
        grid = triton.cdiv(inner, blocks["BN"]), count
        first = Launch(
            up_row, grid, (*inputs, clamp, alpha), {**flags, **blocks}, [y], not transposed
        )
    else:
        flags |= _pairs(tokens, count, hidden.dtype)
        grid = triton.cdiv(inner, flags["BN"]), tokens * count
        first = Launch(up_rows, grid, (*inputs, tokens, clamp, alpha), flags, [y])
    rest = _down(y, chosen, shares, down, down_bias, transposed, hidden, residual)
    return [first, *rest]


def _down(
    y: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    down: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> list[Launch]:
    """Return the launches from gated outputs to the result."""
    (tokens, width), count, inner = hidden.shape, chosen.shape[1], y.shape[1]
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    ends = (
        bias if bias is not None else down,
        residual.contiguous() if residual is not None else hidden,
        out,
    )
    flags: dict[str, Any] = {"N": width, "E": down.shape[0], **_pdl(hidden.device)}
    summed = {**flags, "COUNT": count, "BIAS": bias is not None, "RESIDUAL": residual is not None}
    flags["K"] = inner
    if tokens == 1 and not transposed:
        blocks = _down_blocks(inner)
        grid: tuple[int, ...] = (triton.cdiv(width, blocks["BN"]),)
        arguments: tuple[Any, ...] = (y, chosen, shares, down, *ends)
        summed |= {"K": inner, **blocks}
        return [Launch(down_row, grid, arguments, summed, [out], wants_l1=True)]
    splits, extra = 1, tuple[Any, ...]()
    if tokens == 1:
        blocks = _transposed_blocks()
        programs = triton.cdiv(width, blocks["BN"]) * count
        while programs * splits < _PROGRAMS and inner > 2 * splits * blocks["BK"]:
            splits *= 2
        grid = triton.cdiv(width, blocks["BN"]), count, splits
        kernel, more = down_row_transposed, {**blocks, "SPLITS": splits}
    else:
        blocks = _pairs(tokens, count, hidden.dtype)
        grid = triton.cdiv(width, blocks["BN"]), tokens * count
        extra = (tokens,)
        kernel, more = down_rows, {**blocks, "TRANSPOSED": transposed}
    parts = y.new_empty((tokens * count, splits, width), dtype=torch.float32)
    arguments = (y, chosen, down, parts, *extra)
    each = Launch(kernel, grid, arguments, {**flags, **more}, [parts])
    grid = triton.cdiv(width, 256), tokens
    summed |= {"SPLITS": splits, "BN": 256, "num_warps": 4}
    return [each, Launch(combine, grid, (parts, chosen, shares, *ends), summed, [out])]


def choice(
    scores: torch.Tensor, count: int, softmax: bool, after: str, dtype: torch.dtype
) -> Launch:
    """Return the launch of :func:`expert_ops.choose_experts`."""
    width = scores.shape[-1]
    values = scores.new_empty((*scores.shape[:-1], count), dtype=dtype)
    places = scores.new_empty((*scores.shape[:-1], count), dtype=torch.int64)
    padded = triton.next_power_of_2(width)
    flags = {
        "E": width,
        "EP": padded,
        "COUNT": count,
        "CP": triton.next_power_of_2(count),
        "SOFTMAX": softmax,
        "AFTER": ("", "share", "softmax").index(after),
        "num_warps": 1 if padded <= 256 else 4,
        **_pdl(scores.device),
    }
    arguments = (scores.contiguous(), values, places)
    return Launch(choose, (scores.numel() // width,), arguments, flags, [values, places])


def choice_in_groups(
    logits: torch.Tensor,
    bias: torch.Tensor,
    count: int,
    groups: int,
    kept: int,
    share: bool,
    factor: float,
) -> Launch:
    """Return the launch of :func:`router_ops.choose_in_groups`."""
    tokens, experts = logits.shape
    values = logits.new_empty((tokens, count))
    places = logits.new_empty((tokens, count), dtype=torch.int64)
    size = experts // groups
    flags = {
        **{"G": groups, "GP": triton.next_power_of_2(groups)},
        **{"S": size, "SP": triton.next_power_of_2(size)},
        **{"KEPT": kept, "COUNT": count, "CP": triton.next_power_of_2(count), "SHARE": share},
        "num_warps": 1 if experts <= 256 else 4,
        **_pdl(logits.device),
    }
    arguments = (logits.contiguous(), bias.contiguous(), values, places, factor)
    return Launch(choose_by_group, (tokens,), arguments, flags, [values, places])


@functools.cache
def _pdl(device: torch.device) -> dict[str, bool]:
    pdl = device.type == "cuda" and has_pdl(device)
    return {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}


# Outputs a program, inputs at a time, warps -------------------------------------------------------


def _up_blocks(inputs: int) -> dict[str, int]:
    block = min(1024, triton.next_power_of_2(inputs))
    return {"BN": 1 if inputs <= 2048 else 2, "BK": block, "STAGES": 1, "num_warps": 4}


def _down_blocks(inputs: int) -> dict[str, int]:
    if inputs > 8192:
        return {"BN": 2, "BK": 2048, "num_warps": 4}
    return {"BN": 4, "BK": min(512, triton.next_power_of_2(inputs)), "num_warps": 2}


def _transposed_blocks() -> dict[str, int]:
    return {"BN": 64, "BK": 64, "STAGES": 4, "num_warps": 4}


def _pairs(tokens: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants of the kernels of several tokens; float32 is multiplied as it is."""
    single = dtype == torch.float32
    return {
        "COUNT": count,
        "PAIRS": tokens * count,
        "PADDED": triton.next_power_of_2(tokens * count),
        "M": 16 if tokens <= 16 else 32,
        "BN": 32,
        "BK": 64 if single else 128,
        "STAGES": 2 if single else 4,
        "PRECISION": "ieee" if single else "tf32",
        "num_warps": 4,
    }
