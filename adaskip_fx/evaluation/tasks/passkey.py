"""A number hidden in a long text (Mohtashami and Jaggi, arXiv 2305.16300)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adaskip_fx.data.reference_text import INSTRUCTION, NEEDLE, OPENING, QUESTION
from adaskip_fx.evaluation.examples import Example, Tokens
from adaskip_fx.evaluation.haystack import hide, shuffled_filler
from adaskip_fx.evaluation.prompts import ask, longest_prompt, message
from adaskip_fx.evaluation.task import TaskOptions


@dataclass(frozen=True, kw_only=True)
class Passkey(TaskOptions):
    """Five digits, said twice in one place; a prompt asks for them.

    Attributes:
        path: a UTF-8 text to hide them in; None for the held-out half of ``pydoc_data.topics``.
        forced: score the answer's tokens, given those before, in one pass; else generate.
    """

    name: ClassVar[str] = "passkey"
    metric: ClassVar[str] = "accuracy"
    path: Path | None = None
    forced: bool = True

    def examples(self, tokenizer: Any) -> Sequence[Example]:
        """Return one question each for a number, deeper from example to example."""
        return [self._example(tokenizer, number) for number in range(self.samples)]

    def _example(self, tokenizer: Any, number: int) -> Example:
        rng = self.rng(number)
        key = str(rng.randrange(10_000, 100_000))
        filler = shuffled_filler(self.path, rng)

        def text(count: int) -> str:
            hidden = hide(filler[:count], [NEEDLE.format(key=key)], [self.depth(number)])
            return INSTRUCTION + hidden + QUESTION

        def build(count: int) -> Tokens:
            return message(tokenizer, text(count), OPENING)

        count, prompt = longest_prompt(build, len(filler), self.length, self.name)
        return ask(tokenizer, prompt, text(count), OPENING, key, self.forced)
