"""Whether cuDNN's attention is worth its plan.

cuDNN makes an execution plan for every shape that is new to a thread, which takes the host as long
whatever the shape. Flash attention 2 needs none, and takes longer for each operation. A shape runs
on flash attention until that has cost what the plan costs. So it never takes more than twice the
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

# Operations on flash attention that cost as much as a plan: its seconds, by the seconds that an
# operation takes longer than on cuDNN. Both were chosen on an H200.
_PLAN = 80e-3 / 1.8e-15
_SHAPES = 4096  # that are remembered


class CudnnPlans(threading.local):
    """What the shapes of one thread have cost on flash attention, by operations."""

    def __init__(self) -> None:
        """Begin a thread, which has no plan."""
        self._operations: OrderedDict[Hashable, float] = OrderedDict()

    def pay(self, shape: Hashable, operations: float, plans: int = 1) -> bool:
        """Return whether a call is to run on cuDNN, which is told how many operations it has.

        Args:
            shape: All that its plans depend on.
            operations: Additions and multiplications of the call.
            plans: How many it needs.

        """
        if torch.are_deterministic_algorithms_enabled():
            return True
        total = self._operations.pop(shape, 0.0) + operations
        self._operations[shape] = total
        if len(self._operations) > _SHAPES:
            self._operations.popitem(last=False)  # the one that has not come for the longest time
        return total >= plans * _PLAN
