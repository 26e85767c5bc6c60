"""Questions on a passage, with answered ones before it (TriviaQA, as LongBench sets it up)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from adaskip_fx.evaluation.examples import Generate, Tokens
from adaskip_fx.evaluation.json_records import answers_of, read_records, text_of
from adaskip_fx.evaluation.prompts import longest_prompt, plain
from adaskip_fx.evaluation.task import TaskOptions, required_file

_WHAT = (
    "a JSON list, or JSON lines, of objects with `input` (passage, question, `Answer:`) and "
    "`answers`"
)
Asked: TypeAlias = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class TriviaQA(TaskOptions):
    """A passage with its question, after as many answered ones as fit; F1 of the first line.

    Attributes:
        path: the questions; those that are shown are the file's others.
        limit: new tokens at most.
    """

    name: ClassVar[str] = "trivia"
    metric: ClassVar[str] = "f1"
    path: Path | None = None
    limit: int = 24

    def examples(self, tokenizer: Any) -> Sequence[Generate]:
        """Return one question each, drawn from those whose passage fits.

        Raises:
            ValueError: no passage is short enough.
        """
        path = required_file(self.path, self.name, _WHAT)
        asked = [
            (text_of(path, i, r, "input"), answers_of(path, i, r, "answers"))
            for i, r in enumerate(read_records(path), 1)
        ]
        sizes = [len(plain(tokenizer, _shown(one))) for one in asked]
        order = [i for i, one in enumerate(asked) if len(_asking(tokenizer, one)) <= self.length]
        if not order:
            raise ValueError(
                f"{path}: no passage has at most {self.length} tokens; raise length (--max-length)"
            )
        self.rng(-1).shuffle(order)
        return [self._example(tokenizer, i, asked, sizes) for i in order[: self.samples]]

    def _example(
        self, tokenizer: Any, number: int, asked: Sequence[Asked], sizes: Sequence[int]
    ) -> Generate:
        text, answers = asked[number]
        others = [i for i in range(len(asked)) if i != number]
        self.rng(number).shuffle(others)
        fitting = [asked[i] for i in _within(others, sizes, self.length - sizes[number])]

        def build(count: int) -> Tokens:
            return plain(tokenizer, "".join(map(_shown, fitting[:count])) + text.rstrip())

        _, prompt = longest_prompt(build, len(fitting), self.length, self.name)
        return Generate(prompt, answers, "f1", self.limit, stop="\n")


def _shown(one: Asked) -> str:
    """Return a question with its first answer."""
    return f"{one[0].rstrip()} {one[1][0]}\n\n"


def _asking(tokenizer: Any, one: Asked) -> Tokens:
    return plain(tokenizer, one[0].rstrip())


def _within(order: Sequence[int], sizes: Sequence[int], room: int) -> Iterator[int]:
    """Yield each question, in order, that there is still room for when it comes up."""
    for i in order:
        if sizes[i] <= room:
            room -= sizes[i]
            yield i
