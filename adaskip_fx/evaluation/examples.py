"""What a task asks a model: four kinds of questions, as tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TypeAlias

from adaskip_fx.utils.files import JSON

Tokens: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Generate:
    """Continue the prompt greedily, through ``model.generate``; the text is scored.

    Attributes:
        prompt: tokens, special ones included.
        answers: what is right; empty for what the reference model says.
        metric: one of :data:`adaskip_fx.evaluation.text_metrics.METRICS`.
        limit: new tokens at most.
        stop: the text before which the answer ends; empty for none.
    """

    prompt: Tokens
    answers: tuple[str, ...]
    metric: str
    limit: int
    stop: str = ""


@dataclass(frozen=True)
class Recall:
    """Is every token of the answer the most likely one, given those before it?

    One pass over prompt and answer gives what greedy generation would, without its steps.

    Attributes:
        prompt: tokens, special ones included.
        answer: the tokens that should follow.
    """

    prompt: Tokens
    answer: Tokens


@dataclass(frozen=True)
class Choose:
    """Which of the options is the most likely continuation of the prompt?

    Attributes:
        prompt: tokens, special ones included.
        options: the tokens of each option.
        right: the index of the right one.
    """

    prompt: Tokens
    options: tuple[Tokens, ...]
    right: int


@dataclass(frozen=True)
class Predict:
    """How well is every token predicted from those before it?

    Attributes:
        tokens: the text, special tokens included.
        steps: 0 for one pass over all tokens; else only so many last tokens are predicted, each
            by a decode step of its own, after a prompt of the others.
    """

    tokens: Tokens
    steps: int = 0


Example: TypeAlias = Generate | Recall | Choose | Predict


def to_json(example: Example) -> dict[str, JSON]:
    """Return all of an example, as digests take it."""
    return {"kind": type(example).__name__, **asdict(example)}
