"""Ranges of addresses that keep their place, and the pieces of memory that are behind them."""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Piece(NamedTuple):
    """Memory that came at once: from which byte of a range, how many bytes, its handle."""

    begin: int
    size: int
    handle: Any


class PiecedMemory(ABC):
    """Ranges of addresses, one after the other, and the pieces behind them.

    Attributes:
        block: Bytes that memory comes in.
        sizes: Bytes of addresses, by range; whole blocks.
        bases: Where each range begins.
        filled: Up to which byte there is memory, by range, apart from what was let go.
        pieces: By range, in order.
    """

    def __init__(self, block: int, sizes: Sequence[int]) -> None:
        """Reserve addresses; there is no memory behind them yet."""
        self.block = block
        self.sizes = [self.rounded(size) for size in sizes]
        *starts, total = itertools.accumulate(self.sizes, initial=0)
        base = self._reserve(total)
        self.bases = [base + start for start in starts]
        self.filled = [0] * len(self.sizes)
        self.pieces: list[list[Piece]] = [[] for _ in self.sizes]

    @abstractmethod
    def _reserve(self, size: int) -> int:
        """Return the first of so many addresses."""

    @abstractmethod
    def _map(self, at: int, size: int) -> Any:
        """Put memory behind some addresses; returns its handle."""

    @abstractmethod
    def _unmap(self, at: int, piece: Piece) -> None:
        """Give memory back."""

    @abstractmethod
    def tensor(self, at: int, size: int, owner: object) -> torch.Tensor:
        """Return some addresses, uint8 [size]; there must be memory behind the first one.

        Args:
            at: The first.
            size: How many.
            owner: What lives for as long as the tensor.
        """

    @abstractmethod
    def here(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context to work on it in."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until nothing uses memory that is to go."""

    @abstractmethod
    def retire(self) -> None:
        """Let everything go, since nobody can reach it any more."""

    def rounded(self, size: int) -> int:
        """Return a size in whole blocks."""
        return -(-size // self.block) * self.block

    def extend(self, index: int, needed: int) -> None:
        """Map one piece more, so that there is memory up to byte `needed` of a range."""
        size = self.rounded(needed) - self.filled[index]
        if size <= 0:
            return
        if self.filled[index] + size > self.sizes[index]:
            raise ValueError(f"{needed} bytes of {self.sizes[index]} reserved ones")
        handle = self._map(self.bases[index] + self.filled[index], size)
        self.pieces[index].append(Piece(self.filled[index], size, handle))
        self.filled[index] += size

    def shrink(self, index: int, needed: int) -> None:
        """Unmap from the end whatever reaches beyond `needed` bytes, as it was mapped."""
        pieces = self.pieces[index]
        while pieces and pieces[-1].begin + pieces[-1].size > self.rounded(needed):
            self.let_go(index, pieces[-1])
        self.filled[index] = pieces[-1].begin + pieces[-1].size if pieces else 0

    def has_gaps(self, index: int) -> bool:
        """Return whether a piece was let go before the last one."""
        return sum(piece.size for piece in self.pieces[index]) < self.filled[index]

    def let_go(self, index: int, piece: Piece) -> None:
        """Unmap a piece; what was mapped after it stays where it is."""
        self.pieces[index].remove(piece)
        self._unmap(self.bases[index] + piece.begin, piece)
