"""Memory of heads that forget: behind their first tokens and their last ones, and not between.

Addresses stay what they are, so nothing that reads or writes them knows of it: a piece of memory is
let go when all of its tokens are gone, and new tokens get new pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .growing_memory import GrowingMemory
from .retention import SPARE, Part, Retained, Retention, single_heads

_NEVER = 2**63
_PIECES = 8  # of a window: what is held beyond it is a part of that size at most


class Sliding:
    """Which tokens the K/V heads of one request's buffers hold, and the memory behind them.

    Heads whose memory lies together are a part, which holds what any of them is to hold. Without
    memory that grows in place nothing is let go, and nothing is gone.

    Attributes:
        retention: what is to be held, by layer and K/V head.
        gone: by part, the tokens that are not held any more. Of buffers that came from others, or
            from a file, the parts may be smaller ones than those here.
        reached: tokens up to which there is nothing to do.
    """

    def __init__(
        self,
        memory: GrowingMemory | None,
        ranges: Mapping[Part, Sequence[tuple[int, int]]],
        retention: Retention,
    ) -> None:
        """Begin with what a new request holds.

        Args:
            memory: of keys and values; at most the first block of parts that forget is mapped.
            ranges: where a part's keys and its values are: which range of `memory`, and the bytes
                of a token.
            retention: see the class.
        """
        self._memory = memory
        self._ranges = ranges
        self._hold(retention)

    def _hold(self, retention: Retention) -> None:
        parts = self._ranges if self._memory is not None else ()
        pairs = ((part, part.of(retention)) for part in parts)
        self._forgetful = {part: kept for part, kept in pairs if kept is not None}
        self._indices = frozenset(i for part in self._forgetful for i, _ in self._ranges[part])
        self.retention = retention
        self.gone: dict[Part, range] = {}
        self.reached = 0 if self._indices else _NEVER

    def begin(self, retention: Retention) -> None:
        """Hold what another request is to hold; content is lost."""
        before, gone = self._indices, self.gone
        self._hold(retention)
        if self._memory is not None and (gone or self._indices != before):
            self._memory.clear(
                sorted({i for i, *_ in self._spans(gone)} | (self._indices ^ before))
            )

    def has(self, index: int) -> bool:
        """Return whether a range is of a part that forgets."""
        return index in self._indices

    def pieces(self, layer: int, heads: int, tokens: int) -> list[tuple[Part, range]]:
        """Return what a layer of so many K/V heads holds of the first `tokens` tokens."""
        gone = {part: tokens for part, tokens in self.gone.items() if part.layer == layer}
        whole, found = Part(layer, 0, heads), list[tuple[Part, range]]()
        for part in [whole] if {*gone} <= {whole} else single_heads(layer, heads):
            holes = (hole for other, hole in gone.items() if other.holds(part))
            hole = max(holes, key=lambda hole: hole.stop, default=range(0))
            ends = range(hole.start), range(hole.stop, tokens)
            found += [(part, held) for held in ends if held]
        return found

    def check_back(self, tokens: int) -> None:
        """Refuse to go back to `tokens` tokens, after which windows would see what is gone."""
        for part, gone in self.gone.items():
            retained = part.of(self.retention)
            if retained is not None and tokens - retained.last < gone.stop:
                raise NotImplementedError(
                    f"this cache cannot go back to {tokens} tokens: layer {part.layer} sees a "
                    f"window of {retained.last}, and its tokens {gone.start} to {gone.stop - 1} "
                    "are not held any more; begin the request again, or go on from a copy made "
                    "before"
                )

    def check_shown(self, layer: int) -> None:
        """Refuse to show a layer's keys and values if part of them is gone."""
        for part, gone in self.gone.items():
            if part.layer == layer:
                raise NotImplementedError(
                    f"layer {layer}'s keys and values cannot be shown: its attention sees windows, "
                    f"and tokens {gone.start} to {gone.stop - 1} are not held any more"
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
        if memory is None or not self._forgetful:
            return
        if forget:
            none, parts = range(0), self._forgetful.items()
            gone = {part: kept.gone(length) for part, kept in parts}
            more = (p for p, new in gone.items() if new and new.stop > self.gone.get(p, none).stop)
            self.forget({part: gone[part] for part in more})
        filled, reached = memory.filled, list[int]()
        for part, kept in self._forgetful.items():
            for index, size in self._ranges[part]:
                if total * size > filled[index]:
                    *cuts, end = self._cuts(kept, size, filled[index], total)
                    memory.extend(index, min(end, memory.sizes[index]), cuts)
                reached.append(max(filled[index], memory.filled[index]) // size)
        self.reached = total if total - length > SPARE else min(reached)

    def forget(self, gone: Mapping[Part, range]) -> None:
        """Let tokens go, by part."""
        for part, tokens in gone.items():
            for mine in self._own(part) or [part]:
                self.gone[mine] = tokens
        if self._memory is not None:
            self._memory.let_go(self._spans(gone))

    def _own(self, part: Part) -> list[Part]:
        """Return the parts here that another buffers' part is made of; none where it is smaller."""
        return [part] if part in self._ranges else [p for p in self._ranges if part.holds(p)]

    def _spans(self, gone: Mapping[Part, range]) -> list[tuple[int, int, int]]:
        """Return which bytes of which ranges are of tokens that no head beside them holds."""
        return [
            (index, tokens.start * size, tokens.stop * size)
            for part, tokens in gone.items()
            for mine in self._own(part)
            for index, size in self._ranges[mine]
        ]

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
