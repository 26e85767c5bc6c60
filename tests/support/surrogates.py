"""Random surrogates."""

from __future__ import annotations

import numpy as np

from adaskip_fx.plans.surrogate import SHAPES, Surrogate, SurrogateKind


def surrogate(kind: SurrogateKind, seed: int = 0, hidden: int = 4, rank: int = 2) -> Surrogate:
    draw = np.random.default_rng(seed)
    size = {"H": hidden, "r": rank}
    tensors = {
        name: draw.uniform(0.5, 1.5, [size[letter] for letter in letters])
        for name, letters in SHAPES[kind].items()
    }
    return Surrogate(kind, tensors)
