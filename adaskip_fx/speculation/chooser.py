"""Who drafts next in one request, and how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .controller import Source
from .proposals import Context, Drafter, Drafts, Proposer
from .speculation import Speculation
from .times import PLAIN

#: What a draft that was never measured is supposed to take, in plain steps: to verify, and to make.
_VERIFIED, _MADE = 0.1, 0.9
_CHANCE = 0.8  # that a draft stands of a kind that was never verified, unless its proposer says so


@dataclass(frozen=True, eq=False)
class Offer:
    """A block that is worth its time.

    Attributes:
        name: the proposer's.
        drafter: it.
        source: what is known of such drafts.
        count: how many tokens.
        drafts: the tokens, where they cost nothing.
    """

    name: str
    drafter: Drafter
    source: Source
    count: int
    drafts: Drafts | None


class Chooser:
    """Asks the proposers of one request, and counts what became of their drafts."""

    def __init__(self, speculation: Speculation, rows: int, more: Sequence[Proposer] = ()) -> None:
        """Begin with a request of `rows` rows; `more` propose in it besides, and first."""
        decoding = speculation.decoding
        self._adaptive, self._rows = decoding.adaptive, rows
        self._controller = speculation.controller
        self._drafters = [(p, p.begin()) for p in (*more, *decoding.proposers)]
        self._kinds = dict(self._controller.kinds)  # of drafts to come, where they are not free
        self._begun = set[str]()  # who has drafted, of those that are not free
        self._round, self._tokens = PLAIN, 1
        self._since: float | None = None

    def offer(self, context: Context, most: int, length: int) -> Offer | None:
        """Return the block that is worth most; None where plain steps are faster.

        Args:
            context: the request.
            most: how many drafts there may be.
            length: tokens stored.
        """
        best, best_worth = None, 0.0
        for proposer, drafter in self._drafters if most > 0 else ():
            drafts = drafter.propose(context, most) if proposer.free else None
            if proposer.free and drafts is None:
                continue
            kind, chance = self._kinds.get(proposer.name, ""), _CHANCE
            if drafts is not None:
                kind, chance = drafts.kind, drafts.chance
            source = self._controller.source(proposer.name, kind, chance)
            count = most if drafts is None else drafts.count
            worth = 1.0
            if self._adaptive:
                slope = _VERIFIED if proposer.free else _MADE
                worth, count = self._controller.worth(
                    proposer.name, source, count, self._rows, length, slope
                )
            if count and worth > best_worth:
                best_worth = worth
                best = Offer(proposer.name, drafter, source, count, drafts)
        return best

    def drafts(self, context: Context, offer: Offer) -> Drafts | None:
        """Return the drafts of an offer; None where its proposer has none after all."""
        drafts = offer.drafts or offer.drafter.propose(context, offer.count)
        if drafts is None:
            self._drafters = [pair for pair in self._drafters if pair[1] is not offer.drafter]
            return None
        return drafts.columns(0, offer.count)

    def verified(self, offer: Offer, drafts: Drafts, accepted: int, following: str = "") -> None:
        """Count a block of which the first tokens stand.

        Args:
            offer: whose it is.
            drafts: the block.
            accepted: how many of its tokens.
            following: the kind of that proposer's next drafts, if they are not free.
        """
        self._controller.source(offer.name, drafts.kind, _CHANCE).verified(drafts.count, accepted)
        if offer.drafts is None:
            if offer.name not in self._begun:
                self._controller.kinds[offer.name] = drafts.kind
            self._begun.add(offer.name)
            self._kinds[offer.name] = following
            offer.source.since = 0
        self._round, self._tokens = (offer.name, drafts.count), accepted + 1

    def released(self, offer: Offer, count: int, kept: int) -> None:
        """Count a block of which the first tokens were written without being verified."""
        self._round, self._tokens = (offer.name, count), kept + 1

    def took(self, length: int, undisturbed: bool) -> None:
        """Take the time since the last token, with so many tokens stored.

        Args:
            length: see above.
            undisturbed: whether nothing was captured, linked or recorded meanwhile.
        """
        now, before = self._controller.clock(), self._since
        if before is not None and undisturbed:
            took = self._rows, length, self._round, self._tokens, now - before
            self._controller.took(*took)
        self._since = now
        self._round, self._tokens = PLAIN, 1
