"""A text to learn from, as tokens, and which of them matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens and weights.

    Attributes:
        ids: int64 [1, T].
        weights: [T], of what is predicted at each token (the next one); None: all alike.
    """

    ids: torch.Tensor
    weights: torch.Tensor | None = None

    @property
    def shares(self) -> torch.Tensor:
        """The weights, float32 [T], scaled to a sum of 1."""
        if self.weights is None:
            count = self.ids.shape[1]
            return torch.full((count,), 1 / count)
        return self.weights.float() / self.weights.float().sum()
