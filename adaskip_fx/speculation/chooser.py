"""Who drafts next in one request, and how many tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .controller import Source
from .proposals import Context, Drafter, Drafts, Proposer
from .speculation import Speculation
from .times import PLAIN, Round

#: What a draft that was never measured is supposed to take, in plain steps: to verify, and to make.
_VERIFIED, _MADE = 0.1, 0.9
_LONGEST_REST = 64  # rounds in which a proposer that had nothing to propose is not asked
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
        proposers = (*more, *decoding.proposers)
        self._drafters = [
            (name, p, p.begin()) for name, p in zip(_names(proposers), proposers, strict=True)
        ]
        self._kinds = dict(self._controller.kinds)  # of drafts to come, where they are not free
        self._vain = Counter[str]()  # how often in a row one of these had nothing to propose
        self._rests = dict[str, int]()  # for how many rounds it is not asked
        self._begun = set[str]()  # who has drafted, of those that are not free
        self._round, self._tokens = PLAIN, 1
        self._since: float | None = None
        self._over: tuple[int, Round, int, float] | None = None  # a round that is to be counted
        self._tried: Offer | None = None  # the last offer, if another seemed to be worth more

    def offer(self, context: Context, most: int, length: int) -> Offer | None:
        """Return the block that is worth most; None where plain steps are faster.

        Args:
            context: the request.
            most: how many drafts there may be.
            length: tokens stored.
        """
        best, best_worth, others = None, 0.0, list[Offer]()
        for name, proposer, drafter in self._drafters if most > 0 else ():
            drafts = drafter.propose(context, most) if proposer.free else None
            if drafts is None and (proposer.free or name in self._rests):
                continue
            kind, chance = self._kinds.get(name, ""), _CHANCE
            if drafts is not None:
                kind, chance = drafts.kind, drafts.chance
            source = self._controller.source(name, kind, chance)
            count = most if drafts is None else drafts.count
            worth = 1.0
            if self._adaptive:
                slope = _VERIFIED if proposer.free else _MADE
                worth, count = self._controller.worth(
                    name, source, count, self._rows, length, slope
                )
            found = Offer(name, drafter, source, count, drafts)
            if count and worth > best_worth:
                best_worth, best = worth, found
            if drafts is None:
                others.append(found)
        self._tried = self._overdue(best, others)
        return best if self._tried is None else self._tried

    def _overdue(self, best: Offer | None, others: Sequence[Offer]) -> Offer | None:
        """Return an offer to try instead of the best one, of drafts that are not free either.

        (What pays more than plain steps is drafted; so another plan that pays even more would never
        be seen.) One that was tried in vain is tried less and less often.
        """
        if best is None or best.drafts is not None or not self._adaptive:
            return None
        waiting = [o for o in others if o is not best and o.source.overdue]
        return replace(waiting[0], count=1) if waiting else None

    def drafts(self, context: Context, offer: Offer) -> Drafts | None:
        """Return the drafts of an offer; None where its proposer has none after all.

        Then it rests for a round, for two if the next time is in vain as well, and so on.
        """
        drafts = offer.drafts or offer.drafter.propose(context, offer.count)
        if drafts is None:
            self._rests[offer.name] = min(1 << self._vain[offer.name], _LONGEST_REST)
            self._vain[offer.name] += 1
            return None
        del self._vain[offer.name]
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
            offer.source.tries = offer.source.tries + 1 if offer is self._tried else 0
        self._round, self._tokens = (offer.name, drafts.count), accepted + 1

    def released(self, offer: Offer, count: int, kept: int) -> None:
        """Count a block of which the first tokens were written without being verified."""
        self._round, self._tokens = (offer.name, count), kept + 1

    def now(self) -> float:
        """Return the time, in seconds."""
        return self._controller.clock()

    def affords(self, length: int) -> bool:
        """Return whether another plan may be measured, with so many tokens stored."""
        self.settle()
        return not self._adaptive or self._controller.affords(self._rows, length)

    def measured(self, length: int, since: float, undisturbed: bool) -> None:
        """Take what it took to measure a plan, which is no part of a round.

        Args:
            length: tokens stored.
            since: when it was begun.
            undisturbed: whether nothing was captured meanwhile.
        """
        self.settle()
        seconds = self._controller.clock() - since
        if self._since is not None:
            self._since += seconds
        if undisturbed:
            self._controller.measured(self._rows, length, seconds)

    def took(self, length: int, undisturbed: bool) -> None:
        """Take the time since the last token, which `settle` counts.

        Args:
            length: tokens stored.
            undisturbed: whether nothing was captured, linked or recorded meanwhile.
        """
        self.settle()
        now, before = self._controller.clock(), self._since
        if before is not None and undisturbed:
            self._over = length, self._round, self._tokens, now - before
        self._since = now
        self._round, self._tokens = PLAIN, 1
        self._rests = {name: left - 1 for name, left in self._rests.items() if left}

    def settle(self) -> None:
        """Count the last round, if it is not: that need not be done before the next is begun."""
        over, self._over = self._over, None
        if over is not None:
            self._controller.took(self._rows, *over)


def _names(proposers: Sequence[Proposer]) -> list[str]:
    """Return the names that statistics know proposers by: of several alike with their plans."""
    alike = Counter(p.name for p in proposers)
    plans = [getattr(p, "plan", None) if alike[p.name] > 1 else None for p in proposers]
    named = zip(proposers, plans, strict=True)
    return [p.name if plan is None else f"{p.name} {plan.digest[:8]}" for p, plan in named]
