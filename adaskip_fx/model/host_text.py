"""The tokens of a request on the host, on their way to a streamer."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch

from ..utils.transformers_types import Streamer


class HostText:
    """A streamer that keeps what it is given, and hands it on.

    Attributes:
        rows: the tokens so far, by row.
        ends: the tokens that end a row.
    """

    def __init__(self, rows: list[list[int]], streamer: Streamer | None) -> None:
        """Begin with a prompt, of which the streamer knows already; None: there is no streamer."""
        self.rows = rows
        self.ends: Container[int] = ()
        self._streamer = streamer
        self._going, self._looked = [True] * len(rows), len(rows[0])
        self._late: list[Sequence[int]] = []  # columns that the streamer is yet to be given

    def extend(self, columns: Sequence[Sequence[int]]) -> None:
        """Take tokens of each row that the host has read, one column after the other.

        The streamer is given them when the host has time: by `hand_on`, or with the next ones.
        """
        for column in columns:
            for row, token in zip(self.rows, column, strict=True):
                row.append(token)
        if self._streamer is not None:
            self._late += columns

    @property
    def going(self) -> list[bool]:
        """Which rows have not ended after their prompts."""
        known, self._looked = self._looked, len(self.rows[0])
        for place, row in enumerate(self.rows):
            self._going[place] &= not any(token in self.ends for token in row[known:])
        return list(self._going)

    @property
    def handed(self) -> int:
        """How many tokens of a row the streamer has been given, or would have been."""
        return len(self.rows[0]) - len(self._late)

    def hand_on(self) -> None:
        """Give the streamer what it is yet to be given."""
        while self._late and self._streamer is not None:
            column = torch.tensor(self._late.pop(0), dtype=torch.int64, device="cpu")
            self._streamer.put(column)

    def put(self, value: torch.Tensor) -> None:
        """Take a token of each row, int64 [B]."""
        self.hand_on()
        for row, token in zip(self.rows, value.tolist(), strict=True):
            row.append(token)
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """Take note that there are no more."""
        self.hand_on()
        if self._streamer is not None:
            self._streamer.end()
