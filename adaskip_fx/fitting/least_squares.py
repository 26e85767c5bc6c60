"""From moments to the surrogate that explains the most of what a sublayer adds.

Every rung of the ladder is a least squares fit to the same moments: of `t = y - x`, the weighted
squared error of `x -> stand_in(x) - x` is least. What it leaves, over the same of no surrogate at
all, is the share that stays unexplained.
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
    """The surrogate of a kind with the least weighted squared error.

    Args:
        moments: what it is fitted to; normalized ones for a normalized map.
        kind: which rung.
        rank: of a low-rank map; cut to H.
        ridge: of linear and low-rank maps, in units of the mean diagonal of `moments.inputs`.

    Closed forms: scale and diagonal are regressions without a constant; linear is ridge regression,
    `W = (C_zz + ridge I)^-1 C_zt` (NBL, arXiv 2505.21077), of what the scale leaves: the more it
    is held down, the more it is that scale (the constant is not held down). A low-rank map is the
    best approximation of the ridge regression of all of t in the metric of the inputs (reduced-rank
    regression: the leading singular vectors of `C_xx^1/2 W`).

    A normalized map is held down to nothing.

    ValueError for a scale that is not positive.
    """
    assert moments.normalized == (kind == "normalized")
    if kind == "scale":
        return Surrogate.scale(float(1 + _own(moments)))
    if kind == "diagonal":
        own = moments.products.diagonal() / moments.inputs.diagonal()[:-1].clamp_min(1e-300)
        return Surrogate(kind, {"factor": _numpy(1 + own)})
    held = _held(moments, ridge)
    if kind == "low_rank":
        return _reduced(held, torch.linalg.solve(held, moments.products), rank)
    own = torch.zeros_like(moments.targets) if moments.normalized else _own(moments)
    full = torch.linalg.solve(held, moments.products - own * moments.inputs[:, :-1])
    full[:-1].diagonal().add_(own)
    return Surrogate(kind, {"weight": _numpy(full[:-1].T), "bias": _numpy(full[-1])})


def unexplained(moments: SecondMoments, surrogate: Surrogate) -> float:
    """The share of the weighted squared target that a surrogate leaves; 1 for passing x through."""
    if float(moments.targets) == 0.0:
        return 0.0
    map_ = _as_map(surrogate, moments)
    explained = 2 * (map_ * moments.products).sum() - (map_ * (moments.inputs @ map_)).sum()
    return float(1 - explained / moments.targets)


def left_out(folds: Sequence[SecondMoments], kind: SurrogateKind, rank: int, ridge: float) -> float:
    """The share that stays unexplained of each fold by a fit to the others; the mean over folds."""
    total = functools.reduce(SecondMoments.plus, folds)
    shares = [unexplained(fold, solve(total.minus(fold), kind, rank, ridge)) for fold in folds]
    return sum(shares) / len(shares)


def best_ridge(
    folds: Sequence[SecondMoments],
    kind: SurrogateKind = "linear",
    rank: int = 0,
    ridges: Iterable[float] = RIDGES,
) -> float:
    """The ridge that leaves the least of folds that the fit has not seen."""
    return min(ridges, key=lambda ridge: left_out(folds, kind, rank, ridge))


def smallest_rank(
    folds: Sequence[SecondMoments], ranks: Iterable[int], slack: float = 0.01
) -> tuple[int, float]:
    """The smallest of `ranks` that leaves at most `slack` more than the linear map, and its ridge.

    If none does, H, for the linear map itself.
    """
    ridge = best_ridge(folds)
    wanted = left_out(folds, "linear", 0, ridge) + slack
    for rank in sorted(ranks):
        own = best_ridge(folds, "low_rank", rank)
        if left_out(folds, "low_rank", rank, own) <= wanted:
            return rank, own
    return folds[0].hidden, ridge


def _own(moments: SecondMoments) -> torch.Tensor:
    """The regression of t on x alone: what the scale is above 1."""
    return moments.products.diagonal().sum() / moments.inputs.diagonal()[:-1].sum()


def _held(moments: SecondMoments, ridge: float) -> torch.Tensor:
    held = moments.inputs.clone()
    diagonal = held.diagonal()[:-1]
    diagonal += ridge * diagonal.mean()
    return held


def _reduced(held: torch.Tensor, full: torch.Tensor, rank: int) -> Surrogate:
    hidden = full.shape[1]
    root = torch.linalg.cholesky(_without_constant(held))
    left, values, right = torch.linalg.svd(root.T @ full[:-1], full_matrices=False)
    kept = min(rank, hidden)
    # half of each singular value on either side: bfloat16 weights are then of one size
    half = values[:kept].clamp_min(0).sqrt()
    down = torch.linalg.solve_triangular(root.T, left[:, :kept] * half, upper=True)
    up = half.unsqueeze(1) * right[:kept]
    mean = held[-1, :-1] / held[-1, -1]  # the constant that goes with the map that is left
    bias = full[-1] + mean @ (full[:-1] - down @ up)
    return Surrogate("low_rank", {"down": _numpy(down.T), "up": _numpy(up.T), "bias": _numpy(bias)})


def _without_constant(held: torch.Tensor) -> torch.Tensor:
    """Second moments of x about its weighted mean: what is left when the constant is best."""
    across = held[:-1, -1]
    return held[:-1, :-1] - torch.outer(across, across) / held[-1, -1]


def _as_map(surrogate: Surrogate, moments: SecondMoments) -> torch.Tensor:
    """`surrogate(x) - x` as z M: M [H + 1, H], float64."""
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
