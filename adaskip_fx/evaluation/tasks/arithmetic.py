"""Sums and differences of integers, after Brown et al. (arXiv 2005.14165, section 3.9.1)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from .few_shot import FewShot, Solved


@dataclass(frozen=True, kw_only=True)
class Arithmetic(FewShot):
    """Solved sums and differences, as many as fit, then one to solve.

    Right is an answer whose first number is the result; a difference may be below zero.

    Attributes:
        digits: digits of each of the two numbers, from 1 to 9.
    """

    name: ClassVar[str] = "arithmetic"
    metric: ClassVar[str] = "accuracy"
    instruction: ClassVar[str] = "Add and subtract these numbers."
    opening: ClassVar[str] = "="
    text_metric: ClassVar[str] = "first_integer"
    digits: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.digits, int) or not 1 <= self.digits <= 9:
            raise ValueError(f"arithmetic: digits must be from 1 to 9, got {self.digits!r}")

    def draw(self, rng: random.Random) -> Solved:
        """Return a sum or a difference, either as likely."""
        first, second = (rng.randrange(10 ** (self.digits - 1), 10**self.digits) for _ in range(2))
        if rng.random() < 0.5:
            return Solved(f"{first} + {second}", str(first + second))
        return Solved(f"{first} - {second}", str(first - second))

    def gives_away(self, shown: str, asked: str) -> bool:
        """Return whether it is the same question, or the one with its numbers exchanged."""
        return sorted(shown.split()) == sorted(asked.split())
