"""Perplexity by position, and with a reference model how far the predictions are from its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adaskip_fx.evaluation.examples import Predict
from adaskip_fx.evaluation.haystack import paragraphs, read_text
from adaskip_fx.evaluation.task import TaskOptions


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
            raise ValueError(f"perplexity: edges must rise from above 0, got {self.edges}")
        if self.length < 2:
            raise ValueError("perplexity: length must be at least 2, a token and the next")

    def examples(self, tokenizer: Any) -> Sequence[Predict]:
        """Windows of `length` tokens, the tokenizer's first special tokens included.

        Raises:
            ValueError: the text is too short for one window.
        """
        before = list(tokenizer("")["input_ids"])
        ids = tokenizer(self._text(), add_special_tokens=False, verbose=False)["input_ids"]
        size = self.length - len(before)
        count = min(self.samples, len(ids) // max(size, 1))
        if size < 1 or count < 1:
            raise ValueError(
                f"perplexity: the text has {len(ids)} tokens, too few for one window of "
                f"{self.length}; lower length (--max-length) or give a longer text"
            )
        starts = (i * (len(ids) - size) // max(count - 1, 1) for i in range(count))
        return [Predict((*before, *ids[start : start + size])) for start in starts]

    def _text(self) -> str:
        return "\n\n".join(paragraphs(None)) if self.path is None else read_text(self.path)
