"""Drafts that are looked up: what followed the last tokens where they stood before.

Prompt lookup (Saxena 2023; transformers' ``prompt_lookup_num_tokens``), over prompt and output. The
index grows with the text, so a token costs the same however long the text is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .proposals import Context, Drafts

#: By tokens that were there before: what such drafts are called, and how likely they seem.
_KINDS = (
    (8, "after 8 or more", 0.8),
    (4, "after 4 to 7", 0.6),
    (1, "after fewer", 0.4),
    (0, "in some rows", 0.1),
)


@dataclass(frozen=True)
class Lookup:
    """Proposes what followed the longest earlier copy of the last tokens; it needs no model.

    Attributes:
        least: How many last tokens must have stood there before, at least 1.
        places: How many of the last places with as many are compared.
        compared: How many tokens before a place are compared at most.
    """

    least: int = 2
    places: int = 16
    compared: int = 32

    def __post_init__(self) -> None:
        for name in ("least", "places", "compared"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Lookup({name}=...) must be an integer of at least 1: {value!r}")

    @property
    def name(self) -> str:
        """What statistics call it."""
        return "lookup"

    @property
    def free(self) -> bool:
        """Looking up takes microseconds."""
        return True

    def begin(self) -> LookupDrafter:
        """Return what proposes for a new request."""
        return LookupDrafter(self)


class LookupDrafter:
    """An index of one request's rows."""

    def __init__(self, options: Lookup) -> None:
        """Begin with nothing read."""
        self._options = options
        self._indices: list[_Index] = []

    def propose(self, context: Context, most: int) -> Drafts | None:
        """Return up to `most` tokens; rows without a copy repeat their last token.

        They are on the host: to copy them to a device would wait for what runs there, and not all
        that is proposed is drafted. None where no row has one.
        """
        rows = context.rows
        if len(self._indices) != len(rows):
            self._indices = [_Index(self._options) for _ in rows]
        found = [index.find(row, most) for index, row in zip(self._indices, rows, strict=True)]
        if not any(tokens for tokens, _ in found):
            return None
        copied = [tokens or [row[-1]] * most for (tokens, _), row in zip(found, rows, strict=True)]
        least = min(common for _, common in found)  # of a row without a copy 0
        kind, chance = next((kind, chance) for begin, kind, chance in _KINDS if least >= begin)
        return Drafts.on_host(copied, kind, chance)


class _Index:
    """Where the n-grams of a text end, but for the one at its end."""

    def __init__(self, options: Lookup) -> None:
        self._options = options
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram -> the places after it
        self._read = 0

    def find(self, text: Sequence[int], most: int) -> tuple[list[int], int]:
        """Return what followed the longest copy of the end of `text`, and how long that is.

        The first is [] if there is no copy.
        """
        self._grow(text)
        places = self._ends.get(tuple(text[-self._options.least :]))
        if not places or len(text) < self._options.least:
            return [], 0
        recent = places[-self._options.places :]
        best = max(recent, key=lambda place: (self._common(text, place), place))
        known = list(text[best : best + most])
        period = len(text) - best  # a copy that reaches the end goes on with what it has become
        while len(known) < most:
            known.append(known[len(known) - period])
        return known, self._common(text, best)

    def _grow(self, text: Sequence[int]) -> None:
        least = self._options.least
        for place in range(max(self._read, least), len(text)):
            self._ends.setdefault(tuple(text[place - least : place]), []).append(place)
        self._read = max(self._read, len(text))

    def _common(self, text: Sequence[int], place: int) -> int:
        """Return how many tokens before `place` are those at the end of `text`."""
        count, most = 0, min(place, self._options.compared)
        while count < most and text[place - 1 - count] == text[-1 - count]:
            count += 1
        return count
