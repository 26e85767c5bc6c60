"""Operators of a mixture of experts in a step of a few tokens, and how plain torch computes them.

Of all experts' weights such a step needs those of the few that its tokens chose. They are read
where they are, each once, whichever of the tokens chose it. On CUDA :mod:`cuda_kernels` takes the
place of the reference implementations here.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu

from .ops import MAX_ROWS as MAX_TOKENS

__all__ = ["MAX_EXPERTS", "MAX_TOKENS", "choose_experts", "gated", "run_experts"]

MAX_EXPERTS = 1024  # that one program of a kernel chooses among


@torch.library.custom_op("adaskip::run_experts", mutates_args=())
def run_experts(
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
    """Run each token through the experts that it chose, and add up what they give.

    An expert is ``down(gate(up(x)))`` (Shazeer, "GLU Variants Improve Transformer", SwiGLU):
    ``silu(g) * u`` of the two halves of what ``up`` gives. With a clamp it is GPT-OSS's:
    ``(u + 1) * g * sigmoid(alpha * g)``, g at most `clamp` and u within it.

    Args:
        hidden: [T, H].
        chosen: Numbers of experts, int64 [T, k]; of a number that no expert has nothing comes.
        shares: What each counts, [T, k].
        up: [E, 2 I, H], contiguous; transposed [E, H, 2 I].
        down: [E, H, I], contiguous; transposed [E, I, H].
        up_bias: [E, 2 I], or None.
        down_bias: [E, H], or None.
        transposed: Whether weights are stored with their outputs last.
        interleaved: Whether g and u alternate in what `up` gives, and are no halves of it.
        clamp: Bound of g and u; 0 for SwiGLU.
        alpha: See above; without meaning if there is no clamp.
        residual: Added to the result, of as many numbers as `hidden`; None: nothing.

    Returns:
        [T, H].

    """
    tokens, count = chosen.shape
    wide = torch.promote_types(hidden.dtype, shares.dtype)
    parts = torch.zeros(tokens, count, hidden.shape[1], dtype=wide, device=hidden.device)
    for expert in torch.unique(chosen).tolist():
        if not 0 <= expert < up.shape[0]:
            continue
        token, place = torch.where(chosen == expert)
        both = _product(hidden[token], up[expert], up_bias, expert, transposed)
        between = gated(both, interleaved, clamp, alpha)
        output = _product(between, down[expert], down_bias, expert, transposed)
        parts[token, place] = output * shares[token, place, None]
    result = parts.sum(1).to(hidden.dtype)
    return result if residual is None else result + residual.view_as(result)


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    biases: torch.Tensor | None,
    expert: int,
    transposed: bool,
) -> torch.Tensor:
    return linear(x, weight.T if transposed else weight, None if biases is None else biases[expert])


def gated(both: torch.Tensor, interleaved: bool, clamp: float, alpha: float) -> torch.Tensor:
    """Return what comes between the two products of an expert; see `run_experts`."""
    gate, up = (both[..., ::2], both[..., 1::2]) if interleaved else both.chunk(2, -1)
    if not clamp:
        return silu(gate) * up
    gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


@run_experts.register_fake
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
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("adaskip::choose_experts", mutates_args=())
def choose_experts(
    scores: torch.Tensor, count: int, softmax: bool, after: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest of some scores and where they are, as a router does with its logits.

    Args:
        scores: [..., E], at most `MAX_EXPERTS` in a row.
        count: How many of a row's are returned, in descending order.
        softmax: Whether they are those of the scores' softmax, in float32.
        after: What is done to them: ``"share"`` divides them by their sum, ``"softmax"`` takes
            their softmax, empty nothing.
        dtype: Of the values that are returned.

    Returns:
        Values [..., count] and places, int64 [..., count].

    """
    if softmax:
        scores = torch.softmax(scores, -1, dtype=torch.float32)
    values, places = torch.topk(scores, count, dim=-1)
    if after == "share":
        values = values / values.sum(-1, keepdim=True)
    elif after == "softmax":
        values = torch.softmax(values, -1)
    return values.to(dtype, copy=True), places


@choose_experts.register_fake
def _(
    scores: torch.Tensor, count: int, softmax: bool, after: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*scores.shape[:-1], count)
    return scores.new_empty(shape, dtype=dtype), scores.new_empty(shape, dtype=torch.int64)
