"""Numbers of words, hidden in a long text (RULER's retrieval tasks, arXiv 2404.06654)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adaskip_fx.evaluation.examples import Example, Tokens
from adaskip_fx.evaluation.haystack import hide, shuffled_filler, words
from adaskip_fx.evaluation.prompts import ask, longest_prompt, message
from adaskip_fx.evaluation.task import TaskOptions

_NEEDLE = "The locker number of {word} is {number}."
_INSTRUCTION = "Locker numbers are hidden in the text below. You will be asked for one.\n\n"
_QUESTION = "\n\nWhat is the locker number of {word}? Answer with the number."
_OPENING = "The locker number of {word} is"


@dataclass(frozen=True, kw_only=True)
class Needle(TaskOptions):
    """One sentence that says a number of a word; a prompt asks for it.

    Attributes:
        path: a UTF-8 text to hide it in; None for the held-out half of ``pydoc_data.topics``.
        forced: score the answer's tokens, given those before, in one pass; else generate.
    """

    name: ClassVar[str] = "needle"
    metric: ClassVar[str] = "accuracy"
    path: Path | None = None
    forced: bool = False

    def examples(self, tokenizer: Any) -> Sequence[Example]:
        """Return one question each for a needle, deeper from example to example."""
        return [self._example(tokenizer, number) for number in range(self.samples)]

    @property
    def _count(self) -> int:
        return 1

    def _example(self, tokenizer: Any, number: int) -> Example:
        rng = self.rng(number)
        keys = rng.sample(words(self.path), self._count)
        values = [str(n) for n in rng.sample(range(1_000_000, 10_000_000), self._count)]
        needles = [_NEEDLE.format(word=w, number=v) for w, v in zip(keys, values, strict=True)]
        depths = [self.depth(number), *(rng.random() for _ in needles[1:])]
        filler = shuffled_filler(self.path, rng)
        opening = _OPENING.format(word=keys[0])

        def text(count: int) -> str:
            hidden = hide(filler[:count], needles, depths)
            return _INSTRUCTION + hidden + _QUESTION.format(word=keys[0])

        def build(count: int) -> Tokens:
            return message(tokenizer, text(count), opening)

        count, prompt = longest_prompt(build, len(filler), self.length, self.name)
        return ask(tokenizer, prompt, text(count), opening, values[0], self.forced)


@dataclass(frozen=True, kw_only=True)
class MultiKeyNeedle(Needle):
    """Several such sentences with other words and numbers; one is asked for.

    Attributes:
        keys: sentences in all.
    """

    name: ClassVar[str] = "multikey"
    keys: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.keys, int) or self.keys < 2:
            raise ValueError(f"multikey: keys must be at least 2, got {self.keys!r}")

    @property
    def _count(self) -> int:
        return self.keys
