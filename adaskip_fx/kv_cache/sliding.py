"""Memory of layers that forget: behind their first tokens and their last ones, and not between.

Addresses stay what they are, so nothing that reads or writes them knows of it: a piece of memory is
let go when all of its tokens are gone, and new tokens get new pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .growing_memory import GrowingMemory
from .retention import SPARE, Retained, Retention

_NEVER = 2**63
_PIECES = 8  # of a window: what is held beyond it is a part of that size at most


class Sliding:
    """Which tokens the layers of one request's buffers hold, and the memory behind them.

    Without memory that grows in place nothing is let go, and nothing is gone.

    Attributes:
        retention: what is to be held, by layer.
        gone: by layer, the tokens that are not held any more.
        reached: tokens up to which there is nothing to do.
    """

    def __init__(
        self,
        memory: GrowingMemory | None,
        ranges: Mapping[int, Sequence[tuple[int, int]]],
        retention: Retention,
    ) -> None:
        """Begin with what a new request holds.

        Args:
            memory: of keys and values; at most the first block of layers that forget is mapped.
            ranges: by layer, where its keys and its values are: which range of `memory`, and the
                bytes of a token.
            retention: see the class.
        """
        self._memory = memory
        self._ranges = ranges
        self._hold(retention)

    def _hold(self, retention: Retention) -> None:
        kept = [i for i, retained in enumerate(retention) if retained is not None]
        indices = [index for layer in kept for index, _ in self._ranges.get(layer, ())]
        self._indices = frozenset(indices if self._memory is not None else ())
        self.retention = retention
        self.gone: dict[int, range] = {}
        self.reached = 0 if self._indices else _NEVER

    def begin(self, retention: Retention) -> None:
        """Hold what another request is to hold; content is lost."""
        before, gone = self._indices, self.gone
        self._hold(retention)
        if self._memory is not None and (gone or self._indices != before):
            emptied = {index for layer in gone for index, _ in self._ranges[layer]}
            self._memory.clear(sorted(emptied | (self._indices ^ before)))

    def has(self, index: int) -> bool:
        """Return whether a range is of a layer that forgets."""
        return index in self._indices

    def parts(self, layer: int, tokens: int) -> list[tuple[int, int]]:
        """Return what a layer holds of the first `tokens` tokens: from which on, and how many."""
        gone = self.gone.get(layer)
        if gone is None:
            return [(0, tokens)]
        ends = (0, gone.start), (gone.stop, tokens)
        return [(begin, end - begin) for begin, end in ends if end > begin]

    def check_back(self, tokens: int) -> None:
        """Refuse to go back to `tokens` tokens, after which windows would see what is gone."""
        for layer, gone in self.gone.items():
            retained = self.retention[layer]
            if retained is not None and tokens - retained.last < gone.stop:
                raise NotImplementedError(
                    f"this cache cannot go back to {tokens} tokens: layer {layer} sees a window of "
                    f"{retained.last}, and its tokens {gone.start} to {gone.stop - 1} are not held "
                    "any more; begin the request again, or go on from a copy made before"
                )

    def check_shown(self, layer: int) -> None:
        """Refuse to show a layer's keys and values if part of them is gone."""
        if layer in self.gone:
            gone = self.gone[layer]
            raise NotImplementedError(
                f"layer {layer}'s keys and values cannot be shown: its attention sees windows, and "
                f"tokens {gone.start} to {gone.stop - 1} are not held any more"
            )

    def check_mask(self) -> None:
        """Refuse a mask: attention with one computes all scores."""
        if self.gone:
            raise NotImplementedError(
                "this request has forgotten what its windows do not see, so no attention_mask with "
                "zeros can follow; give the mask from the first prompt on"
            )

    def slide(self, length: int, total: int, forget: bool = True) -> None:
        """Have memory for new tokens, and none for those that nothing reads any more.

        Args:
            length: tokens stored.
            total: with the new ones.
            forget: whether those outside of the windows may go.
        """
        memory = self._memory
        if memory is None or not self._indices:
            return
        if forget:
            none, layers = range(0), enumerate(self.retention)
            gone = {i: kept.gone(length) for i, kept in layers if kept is not None}
            more = (i for i, new in gone.items() if new and new.stop > self.gone.get(i, none).stop)
            self.forget({i: gone[i] for i in more})
        filled, reached = memory.filled, list[int]()
        for layer, kept in enumerate(self.retention):
            if kept is None:
                continue
            for index, size in self._ranges.get(layer, ()):
                if total * size > filled[index]:
                    *cuts, end = self._cuts(kept, size, filled[index], total)
                    memory.extend(index, min(end, memory.sizes[index]), cuts)
                reached.append(max(filled[index], memory.filled[index]) // size)
        self.reached = total if total - length > SPARE else min(reached)

    def forget(self, gone: Mapping[int, range]) -> None:
        """Let tokens go, by layer."""
        self.gone.update(gone)
        if self._memory is not None:
            self._memory.let_go(
                [
                    (index, tokens.start * size, tokens.stop * size)
                    for layer, tokens in gone.items()
                    for index, size in self._ranges.get(layer, ())
                ]
            )

    def _cuts(self, kept: Retained, size: int, filled: int, total: int) -> list[int]:
        """Return where pieces end, in bytes: one stays, one will go as a whole, then small ones."""
        assert self._memory is not None
        block = self._memory.block
        gone = kept.gone(total)
        low, high = -(-gone.start * size // block) * block, gone.stop * size // block * block
        cuts = [block] if not filled else []
        cuts += [cut for cut in (low, high) if max(filled, block) < cut <= high]
        piece = -(-max(1, min(kept.last, total) * size // _PIECES) // block) * block
        begin = max([filled, *cuts])
        return [*cuts, *range(begin + piece, total * size + piece, piece)]
