"""As many at once as memory has room for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class OomBackoff:
    """How many fit into memory at once: half as many after each time that they did not.

    most: at first.
    """

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, do: Callable[[int], T]) -> T:
        """What `do` returns, given how many to take at once; it is begun anew with fewer.

        torch.OutOfMemoryError where there is no room for one.
        """
        while True:
            try:
                return do(self.most)
            except torch.OutOfMemoryError:
                if self.most == 1:
                    raise
            self.most //= 2
