"""A number hidden in a long text (Mohtashami and Jaggi, arXiv 2305.16300)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adaskip_fx.data.reference_text import INSTRUCTION, NEEDLE, OPENING, QUESTION
from adaskip_fx.evaluation.examples import Example, Tokens
from adaskip_fx.evaluation.haystack import filling, hide
from adaskip_fx.evaluation.prompts import ask, fit, message
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
        """One number each, deeper from example to example."""
        return [self._example(tokenizer, number) for number in range(self.samples)]

    def _example(self, tokenizer: Any, number: int) -> Example:
        chance = self.chance(number)
        key = str(chance.randrange(10_000, 100_000))
        straw = filling(self.path, chance)

        def text(count: int) -> str:
            hidden = hide(straw[:count], [NEEDLE.format(key=key)], [self.depth(number)])
            return INSTRUCTION + hidden + QUESTION

        def build(count: int) -> Tokens:
            return message(tokenizer, text(count), OPENING)

        count, prompt = fit(build, len(straw), self.length, self.name)
        return ask(tokenizer, prompt, text(count), OPENING, key, self.forced)
