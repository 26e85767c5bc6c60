"""From second moments to the surrogate that explains the most of what a sublayer adds.

Every kind of surrogate is a least squares fit to the same moments: of `t = y - x`, the weighted
squared error of `x -> surrogate(x) - x` is least. The error that remains, relative to that of no
surrogate at all, is the fraction of unexplained variance (1 - R^2).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adaskip_fx.plans.surrogate import Surrogate, SurrogateKind

from .second_moments import SecondMoments

#: Ridge, in units of the mean diagonal of the moments, from which a fit may choose.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def solve(
    moments: SecondMoments, kind: SurrogateKind, rank: int = 0, ridge: float = 1e-4
) -> Surrogate:
    """Return the surrogate of a kind with the least weighted squared error.

    Closed forms: scale and diagonal are regressions without a constant. Linear is ridge regression,
    `W = (C_zz + ridge I)^-1 C_zt` (NBL, arXiv 2505.21077), of what the scale leaves: the stronger
    the ridge, the nearer the map is to that scale (the constant is not regularized). A low-rank map
    is the best approximation of the ridge regression of all of t in the metric of the inputs
    (reduced-rank regression: the leading singular vectors of `C_xx^1/2 W`). A normalized map is
    regularized towards zero.

    Args:
        moments: what it is fitted to; of normalized streams for a normalized map.
        kind: of the surrogate.
        rank: of a low-rank map; at most H is used.
        ridge: of linear, normalized and low-rank maps, in units of the mean diagonal of
            `moments.inputs`.

    Raises:
        ValueError: moments of normalized streams for another kind or the reverse, or a scale that
            is not positive.
    """
    if moments.normalized != (kind == "normalized"):
        raise ValueError(f"a {kind} surrogate cannot be fitted to these moments")
    if kind == "scale":
        return Surrogate.scale(float(1 + _gain(moments)))
    if kind == "diagonal":
        gains = moments.products.diagonal() / moments.inputs.diagonal()[:-1].clamp_min(1e-300)
        return Surrogate(kind, {"factor": _numpy(1 + gains)})
    inputs = _regularized(moments, ridge)
    if kind == "low_rank":
        return _reduced_rank(inputs, torch.linalg.solve(inputs, moments.products), rank)
    target = torch.zeros_like(moments.targets) if moments.normalized else _gain(moments)
    full = torch.linalg.solve(inputs, moments.products - target * moments.inputs[:, :-1])
    full[:-1].diagonal().add_(target)
    return Surrogate(kind, {"weight": _numpy(full[:-1].T), "bias": _numpy(full[-1])})


def unexplained_variance(moments: SecondMoments, surrogate: Surrogate) -> float:
    """Return the fraction of the weighted squared target that a surrogate leaves unexplained.

    It is 1 for a surrogate that passes x through.
    """
    if float(moments.targets) == 0.0:
        return 0.0
    map_ = _as_map(surrogate, moments)
    explained = 2 * (map_ * moments.products).sum() - (map_ * (moments.inputs @ map_)).sum()
    return float(1 - explained / moments.targets)


def cross_validation_error(
    folds: Sequence[SecondMoments], kind: SurrogateKind, rank: int, ridge: float
) -> float:
    """Return the unexplained variance of each fold by a fit to the others; the mean over folds."""
    total = functools.reduce(SecondMoments.plus, folds)
    fractions = [
        unexplained_variance(fold, solve(total.minus(fold), kind, rank, ridge)) for fold in folds
    ]
    return sum(fractions) / len(fractions)


def best_ridge(
    folds: Sequence[SecondMoments],
    kind: SurrogateKind = "linear",
    rank: int = 0,
    ridges: Iterable[float] = RIDGES,
) -> float:
    """Return the ridge with the least cross-validation error."""
    return min(ridges, key=lambda ridge: cross_validation_error(folds, kind, rank, ridge))


def smallest_rank(
    folds: Sequence[SecondMoments], ranks: Iterable[int], slack: float = 0.01
) -> tuple[int, float]:
    """Return the smallest rank whose map is nearly as good as the linear map, and its ridge.

    Args:
        folds: second moments of each fold.
        ranks: from which to choose.
        slack: by how much its cross-validation error may be above that of the linear map.

    Returns:
        A rank and a ridge; H and the ridge of the linear map where no rank is good enough.
    """
    ridge = best_ridge(folds)
    most = cross_validation_error(folds, "linear", 0, ridge) + slack
    for rank in sorted(ranks):
        of_rank = best_ridge(folds, "low_rank", rank)
        if cross_validation_error(folds, "low_rank", rank, of_rank) <= most:
            return rank, of_rank
    return folds[0].hidden, ridge


def _gain(moments: SecondMoments) -> torch.Tensor:
    """Return the regression of t on x alone, by one number: the scale less 1."""
    return moments.products.diagonal().sum() / moments.inputs.diagonal()[:-1].sum()


def _regularized(moments: SecondMoments, ridge: float) -> torch.Tensor:
    """Return C_zz with the ridge on its diagonal, but for the constant."""
    inputs = moments.inputs.clone()
    diagonal = inputs.diagonal()[:-1]
    diagonal += ridge * diagonal.mean()
    return inputs


def _reduced_rank(inputs: torch.Tensor, full: torch.Tensor, rank: int) -> Surrogate:
    hidden = full.shape[1]
    root = torch.linalg.cholesky(_without_constant(inputs))
    left, values, right = torch.linalg.svd(root.T @ full[:-1], full_matrices=False)
    kept = min(rank, hidden)
    # half of each singular value on either side: bfloat16 weights are then of one size
    half = values[:kept].clamp_min(0).sqrt()
    down = torch.linalg.solve_triangular(root.T, left[:, :kept] * half, upper=True)
    up = half.unsqueeze(1) * right[:kept]
    mean = inputs[-1, :-1] / inputs[-1, -1]  # the constant that goes with the map that is left
    bias = full[-1] + mean @ (full[:-1] - down @ up)
    return Surrogate("low_rank", {"down": _numpy(down.T), "up": _numpy(up.T), "bias": _numpy(bias)})


def _without_constant(inputs: torch.Tensor) -> torch.Tensor:
    """Return second moments of x about its weighted mean, for which the best constant is zero."""
    across = inputs[:-1, -1]
    return inputs[:-1, :-1] - torch.outer(across, across) / inputs[-1, -1]


def _as_map(surrogate: Surrogate, moments: SecondMoments) -> torch.Tensor:
    """Return `surrogate(x) - x` as z M: M [H + 1, H], float64."""
    tensors = {
        name: torch.tensor(value).to(moments.inputs) for name, value in surrogate.tensors.items()
    }
    result = torch.zeros_like(moments.products)
    if "factor" in tensors:
        result[:-1].diagonal().add_(tensors["factor"] - 1)
        return result
    weight = tensors["weight"] if "weight" in tensors else tensors["up"] @ tensors["down"]
    result[:-1], result[-1] = weight.T, tensors["bias"]
    return result


def _numpy(tensor: torch.Tensor) -> npt.NDArray[np.floating[Any]]:
    array: npt.NDArray[np.floating[Any]] = tensor.cpu().numpy()
    return array
