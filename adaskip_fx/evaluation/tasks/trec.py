"""Which kind of answer does a question ask for? Many examples in the prompt (Li and Roth, 2002)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

from adaskip_fx.evaluation.examples import Choose, Tokens
from adaskip_fx.evaluation.prompts import continuation, longest_prompt, plain
from adaskip_fx.evaluation.task import TaskOptions, required_file
from adaskip_fx.utils.files import read_text

_WHAT = "questions as lines `COARSE:fine question` (latin-1)"
#: What the coarse types are called in a prompt.
LABELS = MappingProxyType(
    {
        "ABBR": "abbreviation",
        "DESC": "description",
        "ENTY": "entity",
        "HUM": "person",
        "LOC": "location",
        "NUM": "number",
    }
)
Asked: TypeAlias = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Trec(TaskOptions):
    """Questions with their type, as many as fit, then one whose type is the likeliest label.

    Attributes:
        path: questions to ask, a ``.label`` file.
        train: questions to show; None for the others of `path`.
    """

    name: ClassVar[str] = "trec"
    metric: ClassVar[str] = "accuracy"
    path: Path | None = None
    train: Path | None = None

    def examples(self, tokenizer: Any) -> Sequence[Choose]:
        """Return one question each, drawn without replacement."""
        asked = read_labels(required_file(self.path, self.name, _WHAT))
        shown = asked if self.train is None else read_labels(self.train)
        order = self.rng(-1).sample(asked, min(self.samples, len(asked)))
        return [self._example(tokenizer, i, one, shown) for i, one in enumerate(order)]

    def _example(self, tokenizer: Any, number: int, asked: Asked, shown: Sequence[Asked]) -> Choose:
        others = [one for one in shown if one[1] != asked[1]]
        self.rng(number).shuffle(others)
        end = f"Question: {asked[1]}\nType:"

        def text(count: int) -> str:
            return "".join(f"Question: {q}\nType: {LABELS[t]}\n\n" for t, q in others[:count]) + end

        def build(count: int) -> Tokens:
            return plain(tokenizer, text(count))

        count, prompt = longest_prompt(build, len(others), self.length, self.name)
        labels = [f" {label}" for label in LABELS.values()]
        options = tuple(
            continuation(tokenizer, plain(tokenizer, text(count) + label), prompt, label)
            for label in labels
        )
        return Choose(prompt, options, list(LABELS).index(asked[0]))


def read_labels(path: Path) -> list[Asked]:
    """Return the coarse type and the question of every line of a ``.label`` file.

    Raises:
        ValueError: says which line is not one.
    """
    found = []
    for number, line in enumerate(read_text(path, "latin-1").splitlines(), 1):
        kind, _, question = line.partition(" ")
        coarse = kind.partition(":")[0]
        if coarse not in LABELS or not question.strip():
            raise ValueError(
                f"{path}: line {number} is not `COARSE:fine question` with a type of "
                f"{', '.join(LABELS)}"
            )
        found.append((coarse, question.strip()))
    if not found:
        raise ValueError(f"{path}: no question in it")
    return found
