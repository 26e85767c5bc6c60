"""A question after solved ones of its kind, as many as fit; what tasks of that form share."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from adaskip_fx.evaluation.examples import Generate, Tokens
from adaskip_fx.evaluation.prompts import longest_prompt, plain
from adaskip_fx.evaluation.task import TaskOptions

_MORE = 4  # tokens besides the answer's, so that an answer that goes on is seen to


class Solved(NamedTuple):
    """A question on one line, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class FewShot(TaskOptions, ABC):
    """Solved questions, one a line, then a question whose answer is generated.

    The model continues the lines: a chat template would set the last one apart from the others.
    A longer prompt asks the same question and shows the same solved ones and more; where there
    are few different ones, some come up again. None of them gives the answer away.

    Attributes:
        instruction: the first line.
        opening: what stands between a question and its answer.
        text_metric: compares an answer with the right one; of
            :data:`adaskip_fx.evaluation.text_metrics.METRICS`.
    """

    instruction: ClassVar[str]
    opening: ClassVar[str]
    text_metric: ClassVar[str]

    @abstractmethod
    def draw(self, rng: random.Random) -> Solved:
        """Return a question and its answer."""

    def gives_away(self, shown: str, asked: str) -> bool:
        """Return whether a solved question would say the answer to the one asked."""
        return shown == asked

    def examples(self, tokenizer: Any) -> Sequence[Generate]:
        """Return one question each."""
        return [self._example(tokenizer, number) for number in range(self.samples)]

    def _example(self, tokenizer: Any, number: int) -> Generate:
        rng = self.rng(number)
        asked, shown = self.draw(rng), list[Solved]()

        def build(count: int) -> Tokens:
            while len(shown) < count:
                drawn = self.draw(rng)
                if not self.gives_away(drawn.question, asked.question):
                    shown.append(drawn)
            lines = [f"{s.question} {self.opening} {s.answer}" for s in shown[:count]]
            last = f"{asked.question} {self.opening}"
            return plain(tokenizer, "\n".join([self.instruction, "", *lines, last]))

        # A line has at least one token, so there is always another one to show.
        _, prompt = longest_prompt(build, self.length, self.length, self.name)
        answer = tokenizer(f" {asked.answer}", add_special_tokens=False)["input_ids"]
        limit = len(answer) + _MORE
        return Generate(prompt, (asked.answer,), self.text_metric, limit, stop="\n")
