"""The knapsack of which each item has several options: what is lost least for what must be saved.

The greedy way along the upper hulls of all items (Sinha and Zoltners, "The multiple-choice knapsack
problem", 1979): of all changes of an item to another option the one that loses least for what it
saves is next, until enough is saved. With one thing to save, what has been chosen after each change
loses the least of all choices that save as much. The last change may save more than is needed; so
what need not be is taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def choose_options(
    losses: Sequence[npt.ArrayLike], savings: Sequence[npt.ArrayLike], needs: npt.ArrayLike
) -> tuple[list[int], Array]:
    """Choose one option of each item, or none, so that enough is saved and little lost.

    Args:
        losses: of each item what each option loses, [options], at least 0.
        savings: of each item what each option saves, [options, needs]; may be negative. One that
            saves nothing is never chosen.
        needs: what is to be saved in sum, [needs], in units that compare.

    Returns:
        The option of each item, -1 for none, and what they save together, [needs]: less than the
        needs where no change saves more of what is missing.
    """
    needed = np.asarray(needs, dtype=np.float64)
    items = [_Item(lost, saved, len(needed)) for lost, saved in zip(losses, savings, strict=True)]
    slack = 1e-12 * np.abs(needed)  # sums of floats in another order
    while ((total := _saved(items, needed)) < needed - slack).any():
        best = [item.best(total, needed, slack) for item in items]
        number = min(range(len(items)), key=best.__getitem__, default=-1)
        if number < 0 or best[number][0] == np.inf:
            break
        items[number].chosen = best[number][1]
    else:
        _take_back(items, needed - slack)
    return [item.chosen - 1 for item in items], _saved(items, needed)


class _Item:
    """An item's options, the first of which is none of them: what each loses and saves."""

    def __init__(self, lost: npt.ArrayLike, saved: npt.ArrayLike, needs: int) -> None:
        self.lost: Array = np.concatenate([[0.0], np.asarray(lost, dtype=np.float64)])
        options = np.asarray(saved, dtype=np.float64).reshape(len(self.lost) - 1, needs)
        self.saved: Array = np.concatenate([np.zeros((1, needs)), options])
        self.chosen = 0

    def best(self, total: Array, needed: Array, slack: Array) -> tuple[float, int]:
        """Return what the best change loses for what it saves of what is missing, and its option.

        Of changes that lose nothing, or less than nothing, the one that saves most comes first. One
        that takes back as much of what was saved is none.
        """
        more, missing = self.saved - self.saved[self.chosen], total < needed - slack
        saves = more[:, missing].sum(axis=1)
        nearer = (np.minimum(total + more, needed) - np.minimum(total, needed)).sum(axis=1)
        loses = self.lost - self.lost[self.chosen]
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where(loses > 0, loses / saves, np.minimum(loses, 0.0) - 1e-30 * saves)
        slope = np.where((saves > 1e-15) & (nearer > slack.sum()), slope, np.inf)
        option = int(slope.argmin())
        return float(slope[option]), option


def _saved(items: Sequence[_Item], needed: Array) -> Array:
    total = np.zeros_like(needed)
    for item in items:
        total += item.saved[item.chosen]
    return total


def _take_back(items: Sequence[_Item], needed: Array) -> None:
    """Change single items to options that lose less, as long as enough is saved; most first."""
    while True:
        total, found = _saved(items, needed), list[tuple[float, int, int]]()
        for number, item in enumerate(items):
            enough = (total - item.saved[item.chosen] + item.saved >= needed).all(axis=1)
            gained = np.where(enough, item.lost[item.chosen] - item.lost, 0.0)
            option = int(gained.argmax())
            if gained[option] > 0:
                found.append((-float(gained[option]), number, option))
        if not found:
            return
        _, number, option = min(found)
        items[number].chosen = option
