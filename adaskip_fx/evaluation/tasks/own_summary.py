"""ROUGE-L between what a model and the full model say of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adaskip_fx.evaluation.examples import Generate, Tokens
from adaskip_fx.evaluation.haystack import shuffled_filler
from adaskip_fx.evaluation.prompts import longest_prompt, message
from adaskip_fx.evaluation.task import TaskOptions

INSTRUCTION = "Summarize the text above."


@dataclass(frozen=True, kw_only=True)
class OwnSummary(TaskOptions):
    """Parts of a text, and what the reference model says they are about as the right answer.

    Attributes:
        path: a UTF-8 text; None for the held-out half of ``pydoc_data.topics``.
        limit: new tokens at most.
    """

    name: ClassVar[str] = "own_summary"
    metric: ClassVar[str] = "rouge_l"
    path: Path | None = None
    limit: int = 128

    def examples(self, tokenizer: Any) -> Sequence[Generate]:
        """Return texts without an answer: the reference model is to give it."""
        return [self._example(tokenizer, number) for number in range(self.samples)]

    def _example(self, tokenizer: Any, number: int) -> Generate:
        parts = shuffled_filler(self.path, self.rng(number))

        def build(count: int) -> Tokens:
            return message(tokenizer, "\n\n".join([*parts[:count], INSTRUCTION]))

        _, prompt = longest_prompt(build, len(parts), self.length, self.name)
        return Generate(prompt, (), "rouge_l", self.limit)
