"""The numbers of rows that one captured graph holds for.

One row is a graph of its own: a length of one is never symbolic, and its steps have kernels of
their own. Any more rows are a symbol, and one graph serves all of them. Steps on a static cache
have a graph for each tile of rows that our kernels work on, and one for what is too many for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from adaskip_passes.decode.ops import ROW_TILES

_EXAMPLE = 3  # odd, and few: what graphs are captured with is in memory meanwhile
_COUNTABLE = 2**31 - 1


@dataclass(frozen=True)
class BatchSizes:
    """A range of numbers of rows.

    Attributes:
        least: The fewest rows.
        most: The most rows; None if there is no limit.
    """

    least: int
    most: int | None

    @classmethod
    def only(cls, rows: int) -> BatchSizes:
        """Return one number of rows alone."""
        return cls(rows, rows)

    @classmethod
    def around(cls, rows: int, static_tokens: int = 0) -> BatchSizes:
        """Return the range that a graph for `rows` rows is captured for.

        Args:
            rows: How many there are.
            static_tokens: New tokens of each row of a step on a static cache; 0 for any other.
        """
        if rows < 2:
            return cls.only(rows)
        least = 2
        for tile in ROW_TILES if static_tokens else ():
            most = tile // static_tokens
            if rows <= most:
                return cls(least, most)
            least = max(least, most + 1)
        return cls(least, None)

    @property
    def vary(self) -> bool:
        """Whether it is more than one number."""
        return self.most != self.least

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The fewest and the most rows; None if there are none but those of every length."""
        if self.most is None:
            return (self.least, _COUNTABLE) if self.least > 2 else None
        return self.least, self.most

    @property
    def example(self) -> int:
        """The number of rows to capture with."""
        fitting = max(self.least, _EXAMPLE)
        return fitting if self.most is None else min(fitting, self.most)

    def checked(self, captured: int) -> tuple[int, ...]:
        """Return the numbers of rows that a graph is tried with: two if they vary.

        Args:
            captured: The number that it was captured with.
        """
        other = self.least + (captured == self.least)
        return (captured, other) if self.vary else (captured,)
