"""Whether cuDNN's attention is worth its plan.

cuDNN makes an execution plan for every shape that is new to a thread, which takes the host as long
whatever the shape. Other kernels need none, and take longer for each operation. A shape runs on
another until that has cost what the plan costs. So it never takes more than twice the
time of a choice that knew how often the shape would come (renting skis, and buying them when the
rent has come to their price: Karlin et al., "Competitive Snoopy Caching").

The two round differently, so a prompt may give other logits after a plan was made.
`torch.use_deterministic_algorithms` rules that out: whatever may have a plan has one then.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

import torch

_PLAN = 80e-3  # seconds that a plan takes, on an H200's host
_SHAPES = 4096  # that are remembered


class CudnnPlans(threading.local):
    """What the shapes of one thread have cost on other kernels."""

    def __init__(self) -> None:
        """Begin a thread, which has no plan."""
        self._seconds: OrderedDict[Hashable, float] = OrderedDict()

    def pay(self, shape: Hashable, seconds: float, plans: int = 1) -> bool:
        """Return whether a call is to run on cuDNN.

        Args:
            shape: All that its plans depend on.
            seconds: That the call takes longer on another kernel.
            plans: How many it needs.

        """
        if torch.are_deterministic_algorithms_enabled():
            return True
        total = self._seconds.pop(shape, 0.0) + seconds
        self._seconds[shape] = total
        if len(self._seconds) > _SHAPES:
            self._seconds.popitem(last=False)  # the one that has not come for the longest time
        return total >= plans * _PLAN
