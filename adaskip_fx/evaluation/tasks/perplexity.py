"""Perplexity by position, and with a reference model how far the predictions are from its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from adaskip_fx.evaluation.examples import Predict
from adaskip_fx.evaluation.haystack import paragraphs
from adaskip_fx.evaluation.task import TaskOptions
from adaskip_fx.utils.files import read_text


@dataclass(frozen=True, kw_only=True)
class Perplexity(TaskOptions):
    """Windows of a text, which do not overlap and are spread evenly over it.

    Attributes:
        path: a UTF-8 text; None for the held-out half of ``pydoc_data.topics``.
        edges: where buckets of positions end; the last one has no end.
    """

    name: ClassVar[str] = "perplexity"
    metric: ClassVar[str] = "perplexity"
    samples: int = 8
    path: Path | None = None
    edges: tuple[int, ...] = (256, 1024, 4096, 16384)

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.edges) != sorted({e for e in self.edges if e > 0}):
            raise ValueError(f"{self.name}: edges must rise from above 0, got {self.edges}")
        if self.length < 2:
            raise ValueError(f"{self.name}: length must be at least 2, a token and the next")

    def examples(self, tokenizer: Any) -> Sequence[Predict]:
        """Return windows of `length` tokens, the tokenizer's first special tokens included.

        Raises:
            ValueError: the text is too short for one window.
        """
        before = list(tokenizer("")["input_ids"])
        ids = tokenizer(self._text(), add_special_tokens=False, verbose=False)["input_ids"]
        size = self.length - len(before)
        count = min(self.samples, len(ids) // max(size, 1))
        if size < 1 or count < 1:
            raise ValueError(
                f"{self.name}: the text has {len(ids)} tokens, too few for one window of "
                f"{self.length}; lower length (--max-length) or give a longer text"
            )
        starts = (i * (len(ids) - size) // max(count - 1, 1) for i in range(count))
        return [Predict((*before, *ids[start : start + size])) for start in starts]

    def _text(self) -> str:
        return "\n\n".join(paragraphs(None)) if self.path is None else read_text(self.path)


@dataclass(frozen=True, kw_only=True)
class DecodePerplexity(Perplexity):
    """Perplexity of the last tokens of each window, fed one by one after a prompt of the others.

    So it is the decode plan that is measured, and what a request learns in its window; by
    default the window's 20 tokens and those after it are two buckets.

    Attributes:
        steps: tokens that are predicted.
        edges: where buckets end, counted from the prompt's end, which is 0.
    """

    name: ClassVar[str] = "decode_perplexity"
    samples: int = 4
    steps: int = 128
    edges: tuple[int, ...] = (21,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.steps, int) or not 1 <= self.steps <= self.length - 3:
            raise ValueError(
                f"decode_perplexity: steps must be at least 1 and leave 3 of length "
                f"{self.length} for the prompt, got {self.steps!r}"
            )

    def examples(self, tokenizer: Any) -> Sequence[Predict]:
        """Return the windows of `Perplexity`, to be predicted in steps."""
        return [replace(e, steps=self.steps) for e in super().examples(tokenizer)]
