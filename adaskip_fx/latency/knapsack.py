"""The knapsack: the set of sublayers of least loss that saves the time that must be saved.

Few sublayers differ in what they save, so only how many of each kind are taken is open: of a kind
those that lose least. Kinds are added one after another, and of the partial choices those stay that
no other beats in loss and in every saving (Nemhauser and Ullmann's lists, 1969): exact, and small.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def choose(
    losses: Sequence[float],
    savings: npt.ArrayLike,
    needs: Sequence[float],
    *,
    leave_one: bool = True,
) -> list[int]:
    """Choose the items whose savings reach every need at the least loss.

    Among equal losses the fewest items win, then the first ones.

    Args:
        losses: the loss of each item; may be negative.
        savings: [items, needs], what each item saves; may be negative as well.
        needs: what is to be saved in sum; one number or two.
        leave_one: whether at least one item must not be taken.

    Returns:
        Indices of the chosen items in order.

    Raises:
        ValueError: no choice reaches the needs.
    """
    saved = np.asarray(savings, dtype=np.float64).reshape(len(losses), len(needs))
    kinds, kind_of = np.unique(saved, axis=0, return_inverse=True)
    order = [
        sorted(np.flatnonzero(kind_of.reshape(-1) == k).tolist(), key=lambda i: (losses[i], i))
        for k in range(len(kinds))
    ]
    states = _States.start(len(needs))
    for saving, members in zip(kinds, order, strict=True):
        steps = np.concatenate([[0.0], np.cumsum([losses[i] for i in members])])
        states = states.extended(steps, saving).pruned()
    state = states.best(np.asarray(needs), len(losses) - leave_one)
    return sorted(i for members, n in zip(order, state, strict=True) for i in members[:n])


class _States:
    """Partial choices: the loss of each [n], its savings [n, needs], and counts [n, kinds]."""

    def __init__(self, loss: Array, saved: Array, counts: npt.NDArray[np.int64], items: int):
        self.loss, self.saved, self.counts, self.items = loss, saved, counts, items

    @classmethod
    def start(cls, needs: int) -> _States:
        return cls(np.zeros(1), np.zeros((1, needs)), np.zeros((1, 0), np.int64), 0)

    def extended(self, steps: Array, saving: Array) -> _States:
        """Return every choice with 0, 1, ... items of another kind.

        Args:
            steps: [items + 1], the sums of losses of the first items of the kind.
            saving: [needs], what one item of the kind saves.
        """
        old, new = len(self.loss), len(steps)
        taken = np.tile(np.arange(new), old)
        loss = np.repeat(self.loss, new) + steps[taken]
        saved = np.repeat(self.saved, new, axis=0) + taken[:, None] * saving
        counts = np.column_stack([np.repeat(self.counts, new, axis=0), taken])
        return _States(loss, saved, counts, self.items + new - 1)

    def pruned(self) -> _States:
        """Return the choices that no other beats.

        The choice that takes everything beats nothing, since it may not be the final one.
        """
        taken = self.counts.sum(1)
        front = _Front()
        kept = []
        for i in np.lexsort((*-self.saved.T, taken, self.loss)).tolist():
            row = self.saved[i].tolist()
            if taken[i] == self.items or front.add(row[0], row[-1]):
                kept.append(i)
        return _States(self.loss[kept], self.saved[kept], self.counts[kept], self.items)

    def best(self, needs: Array, most: int) -> list[int]:
        """Return the counts of least loss that reach the needs with at most `most` items."""
        taken = self.counts.sum(1)
        slack = 1e-12 * np.abs(needs)  # sums of floats in another order
        fits = (self.saved >= needs - slack).all(1) & (taken <= most)
        if not fits.any():
            raise ValueError("no choice reaches the needs")
        first = min(np.flatnonzero(fits), key=lambda i: (self.loss[i], taken[i]))
        found: list[int] = self.counts[first].tolist()
        return found


class _Front:
    """Pairs of which none is at least another in both numbers; by rising first number."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.second: list[float] = []  # falling

    def add(self, first: float, second: float) -> bool:
        """Add a pair unless one so far is at least (first, second); return whether it was added."""
        at = bisect_left(self.first, first)
        if at < len(self.first) and self.second[at] >= second:
            return False
        # an equal first number is beaten as well as smaller ones
        end = at + 1 if at < len(self.first) and self.first[at] == first else at
        start = at
        while start and self.second[start - 1] <= second:
            start -= 1
        self.first[start:end] = [first]
        self.second[start:end] = [second]
        return True
