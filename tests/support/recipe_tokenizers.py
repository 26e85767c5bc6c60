"""A tokenizer of every printable character."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.tokenizers import Letters as Plain


class Letters(Plain):
    """One token a letter, for texts, questions and answers."""

    def __call__(self, text: str, **given: Any) -> dict[str, torch.Tensor]:
        given = {"max_length": 10_000, **given}
        return super().__call__(text, True, given["max_length"], "pt")
