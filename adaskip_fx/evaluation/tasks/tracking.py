"""Variables assigned from one another (RULER's variable tracking, arXiv 2404.06654)."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adaskip_fx.evaluation.examples import Generate, Tokens
from adaskip_fx.evaluation.haystack import hide, shuffled_filler
from adaskip_fx.evaluation.prompts import longest_prompt, message
from adaskip_fx.evaluation.task import TaskOptions

_INSTRUCTION = "Assignments of variables are hidden in the text below. Follow them.\n\n"
_QUESTION = "\n\nWhich {count} variables have the value {value}, directly or through others?"
_OPENING = "The variables with the value {value} are"


@dataclass(frozen=True, kw_only=True)
class VariableTracking(TaskOptions):
    """Chains of assignments; which variables have the value that the first chain began with?

    Scored by the share of the chain's variables that the answer names.

    Attributes:
        path: a UTF-8 text to hide them in; None for the held-out half of ``pydoc_data.topics``.
        chains: how many chains there are; the first is asked for.
        hops: assignments of a variable to another in each chain.
    """

    name: ClassVar[str] = "tracking"
    metric: ClassVar[str] = "recall"
    path: Path | None = None
    chains: int = 2
    hops: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.chains, self.hops) < 1 or self.chains * (self.hops + 1) > 500:
            raise ValueError(
                f"tracking: chains and hops must be at least 1, and 500 variables at most; "
                f"got {self.chains} chains of {self.hops} hops"
            )

    def examples(self, tokenizer: Any) -> Sequence[Generate]:
        """Return one question each about a text."""
        return [self._example(tokenizer, number) for number in range(self.samples)]

    def _example(self, tokenizer: Any, number: int) -> Generate:
        rng = self.rng(number)
        size = self.hops + 1
        names = _names(rng, self.chains * size)
        values = [str(n) for n in rng.sample(range(10_000, 100_000), self.chains)]
        chains = [names[i * size : (i + 1) * size] for i in range(self.chains)]
        lines, depths = list[str](), list[float]()
        for chain, value in zip(chains, values, strict=True):
            lines += _assignments(chain, value)
            depths += sorted(rng.random() for _ in chain)  # in the order of the chain
        filler = shuffled_filler(self.path, rng)
        question = _QUESTION.format(count=size, value=values[0])
        opening = _OPENING.format(value=values[0])

        def build(count: int) -> Tokens:
            text = _INSTRUCTION + hide(filler[:count], lines, depths) + question
            return message(tokenizer, text, opening)

        _, prompt = longest_prompt(build, len(filler), self.length, self.name)
        answers = tuple(chains[0])
        limit = len(tokenizer(" ".join(answers), add_special_tokens=False)["input_ids"]) + 16
        return Generate(prompt, answers, "contains_all", limit)


def _names(rng: random.Random, count: int) -> list[str]:
    """Return distinct names of five capital letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    return list(names)


def _assignments(chain: Sequence[str], value: str) -> list[str]:
    sources = [value, *chain[:-1]]
    return [f"VAR {name} = {source}" for name, source in zip(chain, sources, strict=True)]
