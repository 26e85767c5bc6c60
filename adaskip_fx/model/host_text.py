"""The tokens of a request on the host, on their way to a streamer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..utils.transformers_types import Streamer


class HostText:
    """A streamer that keeps what it is given, and hands it on.

    Attributes:
        rows: the tokens so far, by row.
    """

    def __init__(self, rows: list[list[int]], streamer: Streamer | None) -> None:
        """Begin with a prompt, of which the streamer knows already; None: there is no streamer."""
        self.rows = rows
        self._streamer = streamer

    def extend(self, columns: Sequence[Sequence[int]]) -> None:
        """Take tokens of each row that the host has read, one column after the other."""
        for column in columns:
            for row, token in zip(self.rows, column, strict=True):
                row.append(token)
            if self._streamer is not None:
                self._streamer.put(torch.tensor(column, dtype=torch.int64, device="cpu"))

    def put(self, value: torch.Tensor) -> None:
        """Take a token of each row, int64 [B]."""
        for row, token in zip(self.rows, value.tolist(), strict=True):
            row.append(token)
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """Take note that there are no more."""
        if self._streamer is not None:
            self._streamer.end()
