"""What a compiled model keeps of its drafts, beside its requests."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..plans.skip_plan import SkipPlan
from .controller import Controller
from .options import Lossless
from .statistics import DraftStats


class Speculation:
    """The drafts of one compiled model.

    Attributes:
        decoding: what `compile` was given.
        plan: what drafts of the model itself leave out, unless a proposer has a plan of its own.
        stats: what they have come to.
        controller: who drafts, and how much.
    """

    def __init__(
        self, decoding: Lossless, plan: SkipPlan, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Begin with nothing drafted; `clock` tells seconds."""
        self.decoding = decoding
        self.plan = plan
        self.stats = DraftStats()
        self.controller = Controller(clock)
