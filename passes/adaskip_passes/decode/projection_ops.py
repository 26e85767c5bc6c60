"""Operators of a decode step: norms, and several projections of one input with what is around them.

What is computed, in plain torch, which runs on every device; on CUDA :mod:`cuda_kernels` takes its
place.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, linear, relu, silu

#: Activations that `project` knows, and their numbers in its kernels.
ACTIVATIONS = {"": 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4, "relu_squared": 5}


@torch.library.custom_op("adaskip::project", mutates_args=())
def project(
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
    """Compute ``y_i = factors[i] * normalize(x) @ weights[i].T + biases[i]``.

    Of one input with several weights.

    Args:
        x: [..., K], at most `ops.MAX_ROWS` rows in all; of the weights' dtype, or for a norm of one
            that is wider.
        weights: [N_i, K], contiguous.
        biases: [N_i] each; empty when there are none.
        norm: weight of the norm before it, [K]; None: no norm.
        eps: of the norm.
        activation: One of `ACTIVATIONS`. Of two weights ``silu(y_0) * y_1`` alone is returned, of
            one ``silu(y_0)``; empty: all ``y_i``.
        residual: added to the one result, which has its dtype if that is wider; None: nothing.
        offset: added to the norm's weight; see `normalize`.
        shift: added by a layer norm; see `normalize`.
        centered: whether it is a layer norm, which is of one row alone; see `normalize`.
        factors: a number for each weight, which its product is multiplied by; None: all are 1.
        wide: whether results are in float32, and products of what is read summed up unrounded.
    """
    if norm is not None:
        x = normalize(x, norm, eps, offset, shift, centered)
    if wide:
        x, weights, biases = x.float(), [w.float() for w in weights], [b.float() for b in biases]
    if factors is not None:
        products = [linear(x, w) * f for w, f in zip(weights, factors, strict=True)]
        outputs = [y + biases[i] if biases else y for i, y in enumerate(products)]
    else:
        outputs = [linear(x, w, biases[i] if biases else None) for i, w in enumerate(weights)]
    if activation:
        first, *gated = outputs
        first = _activated(first, activation)
        outputs = [first * gated[0] if gated else first]
    return outputs if residual is None else [outputs[0] + residual]


def _activated(x: torch.Tensor, name: str) -> torch.Tensor:
    if name.startswith("gelu"):
        return gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    if name == "silu":
        return silu(x)
    return relu(x).square() if name == "relu_squared" else relu(x)


@project.register_fake
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
    kept = weights[:1] if activation else weights
    dtype = result_dtype(weights, residual, wide)
    return [x.new_empty((*x.shape[:-1], w.shape[0]), dtype=dtype) for w in kept]


def result_dtype(
    weights: list[torch.Tensor], residual: torch.Tensor | None, wide: bool
) -> torch.dtype:
    """Return the dtype of what `project` returns."""
    mine = torch.float32 if wide else weights[0].dtype
    return mine if residual is None else torch.promote_types(mine, residual.dtype)


@torch.library.custom_op("adaskip::normalize", mutates_args=())
def normalize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    shift: torch.Tensor | None = None,
    centered: bool = False,
) -> torch.Tensor:
    """Compute an RMS norm (Zhang and Sennrich, "Root Mean Square Layer Normalization", eq. 4).

    Or a layer norm (Ba et al., "Layer Normalization", eq. 4), which is one of x less its mean.

    Args:
        x: [..., K]; the mean of its squares is taken in float32.
        weight: [K]; what comes out has its dtype, x may be wider.
        eps: Added to that mean.
        offset: Added to the weight, in float32, as is its product then (Gemma); 0: the product is
            one of its dtype.
        shift: [K], added to the result, in float32; None: nothing.
        centered: Whether the mean is subtracted before, and all of it computed in float32.

    """
    wide = x.float()
    if centered:
        wide = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if not offset and not centered and shift is None:
        return weight * (wide * scale).to(weight.dtype)
    result = wide * scale * (offset + weight.float())
    return (result if shift is None else result + shift.float()).to(weight.dtype)


@normalize.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    shift: torch.Tensor | None = None,
    centered: bool = False,
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=weight.dtype)
