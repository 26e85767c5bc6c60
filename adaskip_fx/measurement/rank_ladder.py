"""Low-rank maps of a few ranks, and the linear map, to be timed as surrogates.

They stand in for every other sublayer of one class. None of these has another as its neighbour, so
none is composed with another into one of a higher rank, which would be timed in its place. Each has
weights of its own: on a device that keeps what it has just read, shared ones would be too quick.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..plans.sublayer import Sublayer
from ..plans.surrogate import SHAPES, Surrogate, SurrogateKind
from ..plans.surrogates import Surrogates

_RANKS = 6  # that are timed
_SMALL = 1e-4  # of the weights: the stream stays what it was


def rank_ladder(
    sublayers: Sequence[Sublayer], classes: Sequence[str], hidden: int
) -> tuple[Surrogates, ...]:
    """Return surrogates of each rank, and linear maps, for half of the largest class.

    Args:
        sublayers: the model's.
        classes: the class of each, as in a latency table.
        hidden: H, the width of the residual stream.
    """
    counts = Counter(filter(None, classes))
    if not counts:
        return ()
    largest = max(counts, key=counts.__getitem__)
    members = [s for s, name in zip(sublayers, classes, strict=True) if name == largest]
    rungs: list[tuple[SurrogateKind, int]] = [("low_rank", rank) for rank in ranks_to_time(hidden)]
    return tuple(
        Surrogates({s: _drawn(*rung, hidden, i) for i, s in enumerate(members[::2])})
        for rung in (*rungs, ("linear", 0))
    )


def ranks_to_time(hidden: int) -> tuple[int, ...]:
    """Return the largest powers of two at which a low-rank map is smaller than a linear map."""
    return tuple(2**i for i in range(hidden.bit_length()) if 2 * 2**i < hidden)[-_RANKS:]


def _drawn(kind: SurrogateKind, rank: int, hidden: int, seed: int) -> Surrogate:
    """Return a surrogate of weights that are drawn at random."""
    draw, size = np.random.default_rng(seed), {"H": hidden, "r": rank}
    shapes = {name: [size[letter] for letter in letters] for name, letters in SHAPES[kind].items()}
    return Surrogate(
        kind,
        {name: _SMALL * draw.standard_normal(s, np.float32) for name, s in shapes.items()},
    )
