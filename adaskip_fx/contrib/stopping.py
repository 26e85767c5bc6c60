"""End a generation that the model is no longer sure of."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StoppingCriteria


class ConfidenceStop(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Stop a row when the mean confidence of its last tokens falls below a threshold.

    LiteStage (arXiv 2510.14211) ends the stages of a task so: with layers skipped a model tends to
    write on. The confidence of a token is the probability that it was given when it was taken.

    ``generate`` hands scores over only with ``output_scores=True, return_dict_in_generate=True``.

    Args:
        threshold: between 0 and 1.
        window: how many last tokens; no row is stopped before it has as many.

    Raises:
        ValueError: another threshold, or a window below 1; when called: there are no scores.
    """

    def __init__(self, threshold: float, window: int = 5) -> None:
        if not 0 < threshold < 1 or window < 1:
            raise ValueError(
                "ConfidenceStop: threshold must be between 0 and 1 and window at least 1, got "
                f"{threshold!r} and {window!r}"
            )
        self.threshold = threshold
        self.window = window

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows to stop, bool [B], after the tokens `input_ids` [B, T] of `scores` [B, V]."""
        if not isinstance(scores, tuple):
            raise ValueError(
                "ConfidenceStop needs the scores: call generate with output_scores=True and "
                "return_dict_in_generate=True"
            )
        if len(scores) < self.window:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        recent = torch.stack(scores[-self.window :], 1).float().softmax(-1)
        taken = input_ids[:, -self.window :].unsqueeze(-1)
        return recent.gather(-1, taken).squeeze(-1).mean(1) < self.threshold
