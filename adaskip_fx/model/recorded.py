"""What is returned of every step, for who asks for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..utils.transformers_types import GenerationConfigLike


@dataclass
class Recorded:
    """The scores and logits [B, V] of every step; None where the caller did not ask for them."""

    scores: tuple[torch.Tensor, ...] | None
    logits: tuple[torch.Tensor, ...] | None

    @classmethod
    def nothing(cls, config: GenerationConfigLike) -> Recorded:
        """Return what is recorded before the first step, of what a config asks for."""
        asked = bool(config.return_dict_in_generate)
        return cls(
            () if asked and config.output_scores else None,
            () if asked and config.output_logits else None,
        )

    @property
    def asked(self) -> bool:
        """Whether anything is recorded."""
        return self.scores is not None or self.logits is not None

    def add(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Record a step."""
        if self.scores is not None:
            self.scores += (_alone(scores),)
        if self.logits is not None:
            self.logits += (_alone(logits),)

    def drop(self, steps: int) -> None:
        """Forget the last steps."""
        if steps and self.scores is not None:
            self.scores = self.scores[:-steps]
        if steps and self.logits is not None:
            self.logits = self.logits[:-steps]


def _alone(values: torch.Tensor) -> torch.Tensor:
    """Return values that keep no others alive: those of a block's other tokens."""
    return values.clone() if values.untyped_storage().nbytes() > values.nbytes else values
