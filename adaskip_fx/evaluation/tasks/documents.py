"""A question whose answer is in one of many documents (Liu et al., arXiv 2307.03172)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from adaskip_fx.evaluation.examples import Generate, Tokens
from adaskip_fx.evaluation.json_records import answers_of, invalid_record, read_records, text_of
from adaskip_fx.evaluation.prompts import longest_prompt, message
from adaskip_fx.evaluation.task import TaskOptions, required_file

_WHAT = "JSON lines with `question`, `answers` and `ctxs`, the first of which answers it"
Document: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class _Asked:
    question: str
    answers: tuple[str, ...]
    document: Document


@dataclass(frozen=True, kw_only=True)
class MultiDocumentQA(TaskOptions):
    """The document that answers the question, among as many other questions' as fit.

    Attributes:
        path: the questions, as Lost in the Middle has them (``.jsonl`` or ``.jsonl.gz``).
        score: ``f1``, or ``contains``: whether an answer occurs in what was said.
        limit: new tokens at most.
    """

    name: ClassVar[str] = "documents"
    path: Path | None = None
    score: str = "f1"
    limit: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("f1", "contains"):
            raise ValueError(f"documents: score must be 'f1' or 'contains', got {self.score!r}")

    @property
    def metric(self) -> str:
        """The score that `score` names."""
        return self.score

    def examples(self, tokenizer: Any) -> Sequence[Generate]:
        """Return one question each, its document deeper from example to example."""
        path = required_file(self.path, self.name, _WHAT)
        asked = [_asked(path, i, r) for i, r in enumerate(read_records(path), 1)]
        order = self.rng(-1).sample(asked, min(self.samples, len(asked)))
        return [self._example(tokenizer, i, one, asked) for i, one in enumerate(order)]

    def _example(
        self, tokenizer: Any, number: int, one: _Asked, asked: Sequence[_Asked]
    ) -> Generate:
        others = list(dict.fromkeys(a.document for a in asked if a.document != one.document))
        self.rng(number).shuffle(others)

        def build(count: int) -> Tokens:
            at = round(self.depth(number) * count)
            documents = [*others[:at], one.document, *others[at:count]]
            listed = (f"[{i}] {title}\n{text}" for i, (title, text) in enumerate(documents, 1))
            asking = (
                "Answer the question from the documents, in a few words.\n\n"
                + "\n\n".join(listed)
                + f"\n\nQuestion: {one.question}?"
            )
            return message(tokenizer, asking, "Answer:")

        _, prompt = longest_prompt(build, len(others), self.length, self.name)
        return Generate(prompt, one.answers, self.score, self.limit, stop="\n")


def _asked(path: Path, number: int, record: dict[str, Any]) -> _Asked:
    documents = record.get("ctxs")
    if not isinstance(documents, list) or not documents or not isinstance(documents[0], dict):
        raise invalid_record(path, number, "documents under 'ctxs', the first of which answers it")
    title, text = (text_of(path, number, documents[0], key) for key in ("title", "text"))
    question = text_of(path, number, record, "question").rstrip("?")
    return _Asked(question, answers_of(path, number, record, "answers"), (title, text))
