"""Work in groups that memory has room for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class OomBackoff:
    """Runs a function with a group size that fits into memory.

    The size is halved whenever the device is out of memory, and stays at that. Where several ranks
    run one model none can begin again alone: the others wait for it in the middle of a step.

    Attributes:
        size: how much to take at once.
    """

    def __init__(self, size: int, alone: bool = True) -> None:
        """Begin with a size; `alone`: whether the model is in one process."""
        self.size, self._alone = size, alone

    def __call__(self, function: Callable[[int], T]) -> T:
        """Return what `function` returns for the size; it starts again with a smaller one.

        Raises:
            torch.OutOfMemoryError: there is no room for a size of 1, or on one of several ranks.
        """
        while True:
            try:
                return function(self.size)
            except torch.OutOfMemoryError:
                if self.size == 1 or not self._alone:
                    raise
            self.size //= 2
