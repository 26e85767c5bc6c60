"""Which words are there most often? RULER's aggregation tasks (arXiv 2404.06654)."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adaskip_fx.evaluation.examples import Generate, Tokens
from adaskip_fx.evaluation.haystack import words
from adaskip_fx.evaluation.prompts import longest_prompt, message
from adaskip_fx.evaluation.task import TaskOptions


@dataclass(frozen=True, kw_only=True)
class CommonWords(TaskOptions):
    """A list of words in which a few come up often and the others seldom.

    Scored by the share of the often ones that the answer names.

    Attributes:
        path: a UTF-8 text to take words from; None for the held-out half of ``pydoc_data.topics``.
        common: how many words come up often.
        often, seldom: how many times each word does.
    """

    name: ClassVar[str] = "common_words"
    metric: ClassVar[str] = "recall"
    path: Path | None = None
    common: int = 5
    often: int = 15
    seldom: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.common < 1 or not 1 <= self.seldom < self.often:
            raise ValueError(
                "common_words: common must be at least 1, and seldom at least 1 and below often; "
                f"got {self.common}, {self.seldom}, {self.often}"
            )

    def examples(self, tokenizer: Any) -> Sequence[Generate]:
        """Return one question each about a list."""
        return [self._example(tokenizer, number) for number in range(self.samples)]

    def _example(self, tokenizer: Any, number: int) -> Generate:
        rng = self.rng(number)
        known = list(words(self.path))
        rng.shuffle(known)
        common, others = known[: self.common], known[self.common :]
        # A place of its own for every time, so that a longer list keeps the order of a shorter.
        times = {w: [rng.random() for _ in range(self.often)] for w in common}
        times |= {w: [rng.random() for _ in range(self.seldom)] for w in others}
        question = f"\n\nWhich {self.common} words come up most often in the list?"

        def build(count: int) -> Tokens:
            listed = [*common, *others[:count]]
            order = [w for _, w in sorted((at, w) for w in listed for at in times[w])]
            numbered = (f"{i}. {w}" for i, w in enumerate(order, 1))
            text = "Below is a list of words.\n\n" + " ".join(numbered) + question
            return message(tokenizer, text, "The most frequent words are:")

        _, prompt = longest_prompt(build, len(others), self.length, self.name)
        return Generate(prompt, tuple(common), "contains_all", _limit(tokenizer, common))


@dataclass(frozen=True, kw_only=True)
class FrequentWords(TaskOptions):
    """A text of made-up words whose numbers fall by a power law; which three come up most often?

    The word of rank k comes up in proportion to ``k ** -exponent`` (ranks from 2 on; rank 1 is
    noise). Scored by the share of the three that the answer names.

    Attributes:
        exponent: the exponent of the law.
        vocabulary: made-up words.
    """

    name: ClassVar[str] = "frequent_words"
    metric: ClassVar[str] = "recall"
    exponent: float = 2.0
    vocabulary: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.exponent > 0 or self.vocabulary < 4:
            raise ValueError(
                "frequent_words: exponent must be above 0 and vocabulary at least 4, got "
                f"{self.exponent} and {self.vocabulary}"
            )

    def examples(self, tokenizer: Any) -> Sequence[Generate]:
        """Return one question each about a text."""
        return [self._example(tokenizer, number) for number in range(self.samples)]

    def _example(self, tokenizer: Any, number: int) -> Generate:
        rng = self.rng(number)
        coded = _coded(rng, self.vocabulary)
        mixing = rng.random()

        def build(count: int) -> Tokens:
            text = (
                "Below is a text of coded words. Dots are noise.\n\n"
                + " ".join(self._text(coded, count, mixing))
                + "\n\nWhich three coded words come up most often?"
            )
            return message(tokenizer, text, "The three most frequent coded words are:")

        _, prompt = longest_prompt(build, self.length, self.length, self.name)
        return Generate(prompt, tuple(coded[:3]), "contains_all", _limit(tokenizer, coded[:3]))

    def _text(self, coded: Sequence[str], count: int, mixing: float) -> list[str]:
        """Return about `count` words, mixed; the first three always come up the most often."""
        law = [(k + 2) ** -self.exponent for k in range(len(coded))]
        times = [int(count * share) for share in law]
        fourth = max(times[3:])
        for rank in (2, 1, 0):
            times[rank] = fourth = max(times[rank], fourth + 1)
        text = ["..."] * count
        for word, n in zip(coded, times, strict=True):
            text += [word] * n
        random.Random(mixing).shuffle(text)
        return text


def _coded(rng: random.Random, count: int) -> list[str]:
    """Return distinct words of six letters that no language has."""
    made: dict[str, None] = {}
    while len(made) < count:
        made["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    return list(made)


def _limit(tokenizer: Any, answers: Sequence[str]) -> int:
    """Return the tokens of a numbered list of the answers, and some more."""
    listed = " ".join(f"{i}. {a}" for i, a in enumerate(answers, 1))
    return 16 + len(tokenizer(listed, add_special_tokens=False)["input_ids"])
