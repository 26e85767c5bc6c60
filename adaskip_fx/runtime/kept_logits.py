"""Which tokens' logits a step gives: what forward is asked for, and what is cut off afterwards.

Two graphs are enough for whatever is wanted: one gives the logits of the last token alone, the
other those of the tokens whose indices it is handed, two or more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..capture.arguments import Forward, takes_indices, takes_logits_to_keep


class KeptLogits(NamedTuple):
    """How a step comes to the logits that are wanted.

    Attributes:
        argument: `logits_to_keep` of the model's forward: 1, int64 [K] with K >= 2, or 0 where it
            takes no tensor.
        cut: which of its logits are wanted; None for all.
    """

    argument: int | torch.Tensor
    cut: slice | torch.Tensor | None = None

    @property
    def last(self) -> bool:
        """Whether forward is asked for the last token's alone."""
        return isinstance(self.argument, int) and self.argument == 1

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the wanted ones of what forward gave."""
        return logits if self.cut is None else logits[:, self.cut]


def kept_logits(
    forward: Forward, wanted: int | torch.Tensor, input_ids: torch.Tensor
) -> KeptLogits:
    """Return how a step comes to the logits that are wanted.

    Args:
        forward: of the model.
        wanted: 0 for the logits of all tokens, n for those of the last n; or the indices of some,
            int64 [K] on the model's device.
        input_ids: the step's tokens [B, T].
    """
    tokens = input_ids.shape[1]
    if isinstance(wanted, int):
        if wanted == 1 or tokens == 1 or not takes_logits_to_keep(forward):
            return KeptLogits(1)
        first = max(0, tokens - wanted) if wanted else 0
        if not takes_indices(forward):
            return KeptLogits(0, slice(first, None))
        return KeptLogits(torch.arange(first, tokens, device=input_ids.device))
    if tokens == 1 or not takes_indices(forward):
        return KeptLogits(1 if tokens == 1 else 0, wanted)
    count = wanted.shape[0]
    if count < 2:  # a length below two is never symbolic
        return KeptLogits(torch.nn.functional.pad(wanted, (0, 2 - count)), slice(count))
    return KeptLogits(wanted)


def cut(logits: torch.Tensor, wanted: int | torch.Tensor) -> torch.Tensor:
    """Return the logits that are wanted, as of `kept_logits`, of those of all new tokens."""
    if isinstance(wanted, int):
        return logits[:, -wanted:] if 0 < wanted < logits.shape[1] else logits
    return logits[:, wanted]
