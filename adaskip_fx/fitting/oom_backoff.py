"""Work in groups that memory has room for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class OomBackoff:
    """Runs a function with a group size that fits into memory.

    The size is halved whenever the device is out of memory, and stays at that.

    Attributes:
        size: how much to take at once.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, function: Callable[[int], T]) -> T:
        """Return what `function` returns for the size; it starts again with a smaller one.

        Raises:
            torch.OutOfMemoryError: there is no room for a size of 1.
        """
        while True:
            try:
                return function(self.size)
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
            self.size //= 2
