"""What calibration and fits need of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch


class Tokenizer(Protocol):
    """A tokenizer, such as those of transformers."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, torch.Tensor]:
        """Return `input_ids`, int64 [1, T], and maybe `attention_mask` of one text.

        Args:
            text: to be tokenized.
            options: `return_tensors="pt"`, and maybe `truncation`, `max_length` and
                `add_special_tokens`, as in transformers.
        """
        ...
