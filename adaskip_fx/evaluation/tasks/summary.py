"""Summaries of texts, scored by ROUGE-L (Lin, 2004) against given ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adaskip_fx.evaluation.examples import Generate, Tokens
from adaskip_fx.evaluation.json_records import answers_of, read_records, text_of
from adaskip_fx.evaluation.prompts import longest_prompt, message
from adaskip_fx.evaluation.task import TaskOptions, required_file

from .own_summary import INSTRUCTION

_WHAT = "a JSON list, or JSON lines, of objects with `text` and `summary` (one text or several)"


@dataclass(frozen=True, kw_only=True)
class Summary(TaskOptions):
    """As much of each text as fits, and what a model says it is about.

    Attributes:
        path: texts and their summaries.
        limit: new tokens at most.
    """

    name: ClassVar[str] = "summary"
    metric: ClassVar[str] = "rouge_l"
    path: Path | None = None
    limit: int = 128

    def examples(self, tokenizer: Any) -> Sequence[Generate]:
        """Return a question each about the file's first `samples` texts."""
        path = required_file(self.path, self.name, _WHAT)
        records = read_records(path)[: self.samples]
        return [self._example(tokenizer, path, i, r) for i, r in enumerate(records, 1)]

    def _example(self, tokenizer: Any, path: Path, number: int, record: dict[str, Any]) -> Generate:
        text = text_of(path, number, record, "text")
        words = text.split(" ")

        def build(count: int) -> Tokens:
            return message(tokenizer, f"{' '.join(words[:count])}\n\n{INSTRUCTION}")

        _, prompt = longest_prompt(build, len(words), self.length, self.name)
        answers = answers_of(path, number, record, "summary")
        return Generate(prompt, answers, "rouge_l", self.limit)
