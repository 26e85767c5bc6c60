"""Criteria where several ranks generate one text: what the first one says ends it on all.

A rank that stopped by itself would leave the others waiting for it in their next step. So limits of
time are those of the first one's clock, and of criteria of the user's own the first one's answers
count; the others are asked as well, since they may remember what they were asked. Criteria of
transformers' look at the tokens alone, which are the same on all ranks.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import MaxTimeCriteria, StoppingCriteria

from ..parallel.ranks import Ranks
from ..utils.stateless_rules import remember_nothing


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


class SharedCriterion(StoppingCriteria):  # type: ignore[misc]
    """A criterion that may answer otherwise on another rank: the first one's answers count."""

    def __init__(self, own: Any, ranks: Ranks) -> None:
        """Stop where `own` does on the first of `ranks`."""
        self._own, self._ranks = own, ranks

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        """Return which rows have ended on the first rank, bool [B]."""
        ended = torch.as_tensor(self._own(input_ids, scores, **more), device=input_ids.device)
        ended = ended.to(torch.uint8).expand(input_ids.shape[:1])
        return self._ranks.of_first(ended.clone()).to(torch.bool)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_own"], name)


def share_criteria(criteria: Any, ranks: Ranks) -> None:
    """Replace those of a request's criteria that several ranks may answer otherwise."""
    for at, rule in enumerate(() if ranks.alone else criteria):
        if isinstance(rule, MaxTimeCriteria):
            criteria[at] = SharedClock(rule, ranks)
        elif not remember_nothing([rule]):
            criteria[at] = SharedCriterion(rule, ranks)
