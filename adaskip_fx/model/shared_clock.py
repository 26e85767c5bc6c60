"""A limit of time where several ranks generate one text: the first one's clock is everyone's."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import MaxTimeCriteria

from ..parallel.ranks import Ranks


class SharedClock(MaxTimeCriteria):  # type: ignore[misc]
    """``max_time`` by the first rank's clock, which the others ask after each token."""

    def __init__(self, own: MaxTimeCriteria, ranks: Ranks) -> None:
        """Stop where `own` would on the first of `ranks`."""
        super().__init__(own.max_time, own.initial_timestamp)
        self._ranks = ranks

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_more: Any) -> torch.Tensor:
        """Return for each row whether the time is over, bool [B]."""
        over = self._ranks.first("the time of a request", self._is_over)
        return torch.full(input_ids.shape[:1], over, device=input_ids.device, dtype=torch.bool)

    def _is_over(self) -> bool:
        return bool(time.time() - self.initial_timestamp > self.max_time)


def share_clock(criteria: Any, ranks: Ranks) -> None:
    """Replace limits of time in a request's list of criteria, where there are several ranks."""
    for at, rule in enumerate(criteria):
        if isinstance(rule, MaxTimeCriteria) and not ranks.alone:
            criteria[at] = SharedClock(rule, ranks)
