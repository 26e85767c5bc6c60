"""The statistics that studies report."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def hit_rate(chosen: Collection[Any], right: Collection[Any]) -> float | None:
    """The share of `chosen` that is `right`; None when nothing was chosen."""
    return len(set(chosen) & set(right)) / len(set(chosen)) if chosen else None


def above(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """How often a value of `first` is greater than one of `second`, ties half (the AUC).

    0.5: no difference; 1: each of `first` is greater than all of `second`.
    """
    a, b = np.asarray(first, float)[:, None], np.asarray(second, float)[None]
    return float((a > b).mean() + (a == b).mean() / 2)


def rank_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Spearman's rho; ties share their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    given = np.asarray(values, float)
    return np.array([(given < v).sum() + ((given == v).sum() - 1) / 2 for v in given], float)


def described(values: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float]:
    """Mean, standard deviation and quantiles."""
    low, first, median, third, high = np.quantile(values, (0.1, 0.25, 0.5, 0.75, 0.9)).tolist()
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values)),
        "min": float(np.min(values)),
        "q10": low,
        "q25": first,
        "median": median,
        "q75": third,
        "q90": high,
        "max": float(np.max(values)),
    }
