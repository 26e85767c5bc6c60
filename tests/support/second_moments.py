"""Streams that are drawn, and their moments."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from adaskip_fx.fitting import SecondMoments
from adaskip_fx.plans.surrogate import Surrogate

HIDDEN = 8


Array = np.ndarray[Any, Any]


def drawn(tokens: int = 400, seed: int = 0, noise: float = 0.1) -> tuple[Array, Array]:
    """Streams before and after a sublayer that is nearly linear; norms differ by a hundred."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(tokens, HIDDEN)) * np.exp(draw.uniform(-2, 2, size=(tokens, 1))) + 0.5
    weight = np.random.default_rng(99).normal(size=(HIDDEN, HIDDEN)) / 4
    size = np.linalg.norm(x, axis=1, keepdims=True)
    return x, x + x @ weight + 0.3 + noise * size * draw.normal(size=x.shape)


def moments_of(x: Array, y: Array, parts: int = 3) -> SecondMoments:
    moments = SecondMoments.zeros(HIDDEN, torch.device("cpu"))
    for a, b in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        moments.add(torch.tensor(a)[None], torch.tensor(b)[None])
    return moments


def weighted(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Return z, x and t with every token divided by |x|."""
    size = np.linalg.norm(x, axis=1, keepdims=True)
    return np.hstack((x, np.ones((len(x), 1)))) / size, x / size, (y - x) / size


def as_map(surrogate: Surrogate) -> Array:
    """Return a linear or low-rank map as M [H + 1, H], the constant last."""
    t = surrogate.tensors
    weight = t["weight"] if "weight" in t else t["up"].astype(float) @ t["down"]
    return np.vstack((weight.T, t["bias"]))
