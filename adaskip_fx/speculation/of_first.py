"""Tokens and acceptance of rank 0, where several ranks run one model.

Logits are the same on all ranks but for the order in which sums over ranks are added up. So the
best token, or whether a draft stands, might be another one on another rank, which would go on with
another text. Each rank asks the rule, as all of them draw the same random numbers and keep the same
count; what rank 0 is told counts. It comes over the model's process group, as sums do.
"""

from __future__ import annotations

import torch

from ..parallel.ranks import Ranks
from .acceptance import Column, Rule
from .proposals import Drafts


class OfFirst:
    """What a rule says on rank 0, on all ranks."""

    def __init__(self, rule: Rule, ranks: Ranks) -> None:
        """Ask `rule` on all of `ranks`."""
        self._rule, self._ranks = rule, ranks

    def accepts(self, scores: torch.Tensor, drafts: Drafts, logits: torch.Tensor) -> torch.Tensor:
        """Return which drafts may stand by the rule."""
        stand = self._rule.accepts(scores, drafts, logits)
        return self._ranks.of_first(stand.to(torch.uint8)).to(torch.bool)

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the tokens that the rule chooses, and whether that is impossible."""
        return self._same(*self._rule.choose(scores))

    def replace(self, column: Column) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the rule puts in place of a column of drafts; see `choose`."""
        return self._same(*self._rule.replace(column))

    def settle(self, columns: torch.Tensor) -> None:
        """Have the rule take note of what stands."""
        self._rule.settle(columns)

    def _same(
        self, tokens: torch.Tensor, invalid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if invalid is None:
            return self._ranks.of_first(tokens), None
        both = self._ranks.of_first(torch.cat((tokens, invalid.to(torch.int64).view(1))))
        return both[:-1], both[-1] > 0
