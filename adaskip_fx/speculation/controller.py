"""How many tokens to draft, and who drafts: the most tokens for the time, as far as was measured.

A block of k drafts of which the i-th stands with probability a(i), given those before it, gives
1 + a(1) + a(1) a(2) + ... tokens. Over its time in plain steps that is its worth; a plain step's is
1. What is worth less is not drafted, but tried again now and then, on credit: each token earns a
fiftieth of a plain step, and what rounds have lost against plain steps is taken from it. The more
it is below nothing, the more a block must be worth.

To measure another plan is paid from savings of its own, of which each token earns a hundredth of a
plain step. So what is tried in vain costs three of a hundred steps at most, in the long run.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

from .times import PLAIN, Round, Times

#: Drafts of a block: with the token before them as many as a GPU's recorded steps have.
LENGTHS = (1, 3, 7, 15)
_EARNED = 0.02  # of a plain step, by each token
_MOST_CREDIT = 3.0  # plain steps
_MOST_LOST = 4.0  # plain steps, by one round: what took longer was the host's
_WAKE = 2  # plain steps after a block whose times are the block's: a host catches up
_SAVED = 0.01  # of a plain step, by each token
_MOST_SAVED = 100.0  # plain steps
_PRICE = 8.0  # plain steps that measuring a plan is supposed to take, with linking and recording it
_CAUTION = 0.5  # that a block must be worth more for each plain step that was lost
_AGAIN = 32  # tokens after which what is not worth it may be tried again
_MOST_TRIES = 4  # after which that is no rarer
_HELD = 8  # tokens for which it is not looked at again: between two steps there is little time
_FRESH = 64  # tokens for which the time of a plain step is believed
_DECAY = 0.9  # of what was seen, at each new block
_SUPPOSED = 2.0  # drafts that what is supposed of a source counts as
_WEIGHT = 0.5  # drafts that a position counts as for the next one


class Source:
    """What is known of one kind of drafts: of a proposer, or of a part of what it proposes.

    Attributes:
        since: tokens since the last block.
        tries: blocks in vain, while another kind was worth more.
    """

    def __init__(self, chance: float) -> None:
        """Suppose that the first draft of a block stands with this probability."""
        self.since = self.tries = 0
        self._refused = (0, 0, 0)  # rows, drafts and `since`, when no block was worth it
        # by position: drafts whose predecessors stand, and how many of them do; earlier ones less
        self._tried, self._stood = [_SUPPOSED], [_SUPPOSED * chance]

    @property
    def overdue(self) -> bool:
        """Whether another block may be tried, although another kind is worth more."""
        return self.since >= _AGAIN << min(self.tries, _MOST_TRIES)

    def refuse(self, rows: int, most: int) -> None:
        """Remember that no block of up to `most` drafts is worth it now."""
        self._refused = rows, most, self.since

    def refuses(self, rows: int, most: int) -> bool:
        """Return whether that was found a few tokens ago."""
        known, longest, since = self._refused
        return rows == known and most <= longest and 0 <= self.since - since < _HELD

    def acceptance(self, count: int) -> list[float]:
        """Return how likely each of `count` drafts is to stand, if those before it do.

        Of a position that was not reached for long that is what is known of the one before.
        """
        known, found = self._stood[0] / self._tried[0], list[float]()
        for position in range(count):
            if 0 < position < len(self._tried):
                stood, tried = self._stood[position], self._tried[position]
                known = (stood + _WEIGHT * known) / (tried + _WEIGHT)
            found.append(known)
        return found

    def tokens(self, count: int) -> list[float]:
        """Return how many tokens to expect of blocks of 0, 1, ... `count` drafts."""
        total, all_stand = [1.0], 1.0
        for chance in self.acceptance(count):
            all_stand *= chance
            total.append(total[-1] + all_stand)
        return total

    def verified(self, count: int, accepted: int) -> None:
        """Count a block of `count` drafts, of which the first ones stand."""
        missing = [0.0] * (count - len(self._tried))
        self._tried = [seen * _DECAY for seen in self._tried + missing]
        self._stood = [seen * _DECAY for seen in self._stood + missing]
        for position in range(min(accepted + 1, count)):
            self._tried[position] += 1
            self._stood[position] += position < accepted
        self.since, self._refused = 0, (0, 0, 0)


class Controller:
    """Chooses blocks for one compiled model.

    Attributes:
        times: of rounds.
        credit: plain steps that may be lost by trying.
        savings: plain steps that may go into measuring other plans.
        clock: where seconds come from.
        kinds: of the drafts that requests begin with, by proposers that are not free.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin with nothing seen."""
        self.times = Times()
        self.credit = self.savings = 0.0
        self._prices: deque[float] = deque(maxlen=5)
        self.clock = clock
        self.kinds: dict[str, str] = {}
        self._sources: dict[tuple[str, str], Source] = {}
        self._since_plain = _FRESH
        self._since_block = _WAKE  # plain steps

    def source(self, name: str, kind: str, chance: float) -> Source:
        """Return what is known of drafts of a kind, by the proposer of this name."""
        known = self._sources.get((name, kind))
        if known is None:
            known = self._sources[name, kind] = Source(chance)
        return known

    def worth(
        self, name: str, source: Source, most: int, rows: int, length: int, slope: float
    ) -> tuple[float, int]:
        """Return the worth of the best block, and how many drafts it has; 0 if none is worth it.

        Args:
            name: of the proposer.
            source: the drafts.
            most: how many there can be.
            rows: of the batch.
            length: tokens stored.
            slope: what a draft takes if that was never measured, in plain steps.
        """
        if source.refuses(rows, most):
            return 0.0, 0
        if self.times.plain(rows, length) is None or self._since_plain >= _FRESH:
            return 0.0, 0  # there is nothing to compare with
        lengths = [k for k in LENGTHS if k < most] + [most]
        known = [(self.times.ratio(rows, length, (name, k), slope), k) for k in lengths]
        tokens = source.tokens(most)
        worth, best = max((tokens[k] / ratio, k) for ratio, k in known)
        if worth > 1 + _CAUTION * max(0.0, -self.credit):
            return worth, best
        ratio, least = known[0]
        if source.since >= _AGAIN and self.credit >= ratio - 1:
            return 1.0, least
        source.refuse(rows, most)
        return worth, 0

    def took(self, rows: int, length: int, kind: Round, tokens: int, seconds: float) -> None:
        """Count a round that gave `tokens` tokens of each row."""
        self._since_plain = 0 if kind == PLAIN else self._since_plain + tokens
        self._since_block = self._since_block + 1 if kind == PLAIN else 0
        for source in self._sources.values():
            source.since += tokens
        self.times.add(rows, length, kind, seconds)
        self.savings = min(_MOST_SAVED, self.savings + _SAVED * tokens)
        plain = self.times.plain(rows, length)
        if plain is not None:  # other plain steps lose nothing, though some are slower than most
            gained = tokens - seconds / plain if self._since_block <= _WAKE else 0.0
            gained = max(-_MOST_LOST, gained) + _EARNED * tokens
            self.credit = min(_MOST_CREDIT, self.credit + gained)

    def affords(self, rows: int, length: int) -> bool:
        """Return whether the savings pay for measuring another plan."""
        price = statistics.median(self._prices) if self._prices else _PRICE
        return self.times.plain(rows, length) is not None and self.savings >= price

    def measured(self, rows: int, length: int, seconds: float) -> None:
        """Pay for a plan that was measured."""
        plain = self.times.plain(rows, length)
        if plain is not None:
            self._prices.append(seconds / plain)
            self.savings -= seconds / plain
