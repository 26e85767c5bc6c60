"""Which brackets close a sequence? After dyck_languages of BIG-bench (arXiv 2206.04615).

BIG-Bench Hard has it as well (Suzgun et al., arXiv 2210.09261): tasks on which no model that had
been evaluated did better than the average person.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from .few_shot import FewShot, Solved

_CLOSING = MappingProxyType({"(": ")", "[": "]", "{": "}", "<": ">"})


@dataclass(frozen=True, kw_only=True)
class Brackets(FewShot):
    """Sequences of brackets with what closes them, as many as fit, then one to close.

    A sequence has as many pairs that are closed as brackets that are not. Right is an answer of
    the closing brackets in their order and nothing else, white space aside.

    Attributes:
        unclosed: the depth of a sequence at its end: how many brackets are still open.
    """

    name: ClassVar[str] = "brackets"
    metric: ClassVar[str] = "accuracy"
    instruction: ClassVar[str] = (
        "Complete every sequence, so that all brackets are closed in the right order."
    )
    opening: ClassVar[str] = "Output:"
    text_metric: ClassVar[str] = "exact_characters"
    unclosed: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.unclosed, int) or self.unclosed < 1:
            raise ValueError(f"brackets: unclosed must be at least 1, got {self.unclosed!r}")

    def draw(self, rng: random.Random) -> Solved:
        """Return a sequence and what closes it."""
        opens, closes = 2 * self.unclosed, self.unclosed
        sequence, stack = list[str](), list[str]()  # on the stack: what closes each open bracket
        while opens or closes:
            if stack and rng.random() * (opens + closes) < closes:
                sequence.append(stack.pop())
                closes -= 1
            else:
                bracket = rng.choice("([{<")
                sequence.append(bracket)
                stack.append(_CLOSING[bracket])
                opens -= 1
        return Solved(f"Input: {' '.join(sequence)}", " ".join(reversed(stack)))
