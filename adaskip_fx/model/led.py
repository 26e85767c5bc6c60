"""Drafts where a model is on several ranks: rank 0 decides each round, and the others follow.

How much is drafted depends on the clock, and what proposers do on whatever they like. Ranks that
decide for themselves would run other programs, whose sums over ranks do not belong together. So
rank 0 alone asks its proposers and its clock. What it comes to is an order, one message to all in a
round (one more where the model itself drafts), and nothing runs on several ranks without one.
Tokens and acceptance are rank 0's as well (`OfFirst`), as is what drafts diverge (`Budget`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ..parallel.ranks import portable
from ..plans.skip_plan import SkipPlan
from ..speculation.proposals import Drafts
from ..speculation.speculation import Speculation
from ..utils.transformers_types import DecodingCall, MakeCandidates
from . import generation
from .drafted import DraftedRequest

if TYPE_CHECKING:
    from .types import CompiledCausalLM

_WHAT = "a round of drafts"
_KEPT = 256  # plans that are known by their digests


@dataclass(frozen=True)
class Ahead:
    """Run a plain step while the last token is on its way to the host."""


@dataclass(frozen=True)
class Plain:
    """Run a plain step."""


@dataclass(frozen=True)
class UnderPlan:
    """Decode drafts under a plan, or measure it.

    Attributes:
        digest: of the plan.
        plan: it, when it comes for the first time; else None.
        most: how many drafts; 0: its matchness is measured.
        verifies: whether the next block is verified.
    """

    digest: str
    plan: SkipPlan | None
    most: int
    verifies: bool


@dataclass(frozen=True)
class Block:
    """Verify drafts, or write them as they are.

    Attributes:
        name: of their proposer.
        kind: theirs.
        count: how many of each row.
        tokens: by row; None for the first ones of those that were decoded last.
        verifies: whether they are verified.
        tossed: whether a coin has decided that.
    """

    name: str
    kind: str
    count: int
    tokens: list[list[int]] | None
    verifies: bool
    tossed: bool


@dataclass(frozen=True)
class Stop:
    """There are no more rounds."""


@dataclass(frozen=True)
class Failed:
    """Raise what rank 0 raises between two rounds."""

    error: Exception


Order: TypeAlias = Ahead | Plain | UnderPlan | Block | Stop | Failed


def decode_with_drafts(
    model: CompiledCausalLM,
    call: DecodingCall,
    speculation: Speculation,
    assistant: MakeCandidates | None = None,
) -> Any:
    """Decode with drafts, on one rank or several; arguments as of `DraftedRequest`.

    Raises:
        Exception: on every rank, what rank 0 raised between two rounds: its proposer, for one.
    """
    ranks = model._adaskip.ranks
    if ranks.alone:
        return generation.run(model, DraftedRequest(model, call, speculation, assistant))
    kind = LeadingRequest if ranks.rank == 0 else FollowingRequest
    request, agreed = kind(model, call, speculation, assistant), None
    with ranks.step():  # so that a rank which leaves it alone is told to the others
        try:
            return generation.run(model, request)
        except Exception as error:
            if not request.is_told(error):
                raise
            agreed = error
    raise agreed


class LeadingRequest(DraftedRequest):
    """A request on rank 0, which says what all ranks do."""

    def __init__(self, *given: Any) -> None:
        """Read the prompt; arguments as of `DraftedRequest`."""
        self._awaited = False  # whether the others wait for an order
        self._own: Drafts | None = None
        super().__init__(*given)

    @property
    def goes_ahead(self) -> bool:
        """Whether nothing is worth drafting; see `DraftedRequest`."""
        self._awaited = True
        if not super().goes_ahead:
            return False
        self._say(Ahead())
        return True

    def advance(self) -> bool:
        """Decide on a round, and run it."""
        self._awaited = True
        return super().advance()

    def plain(self) -> bool:
        """Run a plain step on all ranks."""
        self._say(Plain())
        return super().plain()

    def draft(self, plan: SkipPlan, most: int) -> Drafts | None:
        """Return tokens decoded under `plan`, on all ranks."""
        self._say_plan(plan, most)
        self._own = super().draft(plan, most)
        self._awaited = True
        return self._own

    def measure(self, plan: SkipPlan) -> float:
        """Return the matchness of a plan, which all ranks read the last tokens with."""
        self._say_plan(plan, 0)
        share = super().measure(plan)
        self._awaited = True
        return share

    def block(self, name: str, drafts: Drafts) -> tuple[int, bool]:
        """Verify drafts on all ranks, or write them as they are.

        Raises:
            ValueError: They have logits that only rank 0 has.
        """
        own = drafts.logits is not None and _begin_alike(drafts, self._own)
        if drafts.logits is not None and not own:
            raise ValueError(
                f"{name} proposes drafts with logits that are not what Context.draft has returned "
                "last, or its first columns; where a model is on several ranks the others do not "
                "have them: leave logits out"
            )
        coin = None if self.budget is None else self.budget.coin
        tossed = coin is not None and coin.tossed
        tokens = None if own else drafts.tokens.tolist()
        self._say(Block(name, drafts.kind, drafts.count, tokens, self._verifies, tossed))
        return super().block(name, drafts)

    def is_told(self, error: Exception) -> bool:
        """Return whether an error was one between two rounds, which all ranks raise now."""
        if self._awaited:
            self._say(Failed(portable(error)))
            return True
        return False

    def result(self, cache: Any) -> Any:
        """Return what ``generate`` returns."""
        if self._awaited:
            self._say(Stop())
        return super().result(cache)

    def _say_plan(self, plan: SkipPlan, most: int) -> None:
        known = self._speculation.told
        content = None if plan.digest in known else plan
        self._say(UnderPlan(plan.digest, content, most, self._verifies))
        _keep(known, plan)

    def _say(self, order: Order) -> None:
        """Have all ranks do something, which whoever calls this does as well.

        Tokens are streamed before, while the others wait for the order: from that wait they can be
        called away where a streamer fails, from a sum over gloo they cannot.
        """
        self._awaited = False
        if not isinstance(order, Failed):
            self._text.hand_on()
        self._model._adaskip.ranks.first(_WHAT, lambda: order)


class FollowingRequest(DraftedRequest):
    """A request on another rank, which does what rank 0 says; its own proposers are not asked."""

    def __init__(self, *given: Any) -> None:
        """Read the prompt; arguments as of `DraftedRequest`."""
        self._order: Order | None = None  # that has come, and is to be followed yet
        self._failure: Exception | None = None
        self._drafted: Drafts | None = None
        super().__init__(*given)

    @property
    def goes_ahead(self) -> bool:
        """Whether rank 0 goes ahead; any other order is followed by `advance`."""
        order = self._listen()
        self._order = None if isinstance(order, Ahead) else order
        return self._order is None

    def received(self) -> None:
        """Take note that the host has the last token; no time is taken."""
        super(DraftedRequest, self).received()

    def advance(self) -> bool:
        """Follow orders up to the end of a round; returns whether the request has ended."""
        while True:
            order, self._order = self._order or self._listen(), None
            if isinstance(order, UnderPlan):
                self._decode_under(order)
            elif isinstance(order, Plain):
                return self.plain()
            elif isinstance(order, Block):
                return self._follow(order)
            else:
                return True

    def is_told(self, error: Exception) -> bool:
        """Return whether an error is one that rank 0 has sent to all."""
        return error is self._failure

    def _decode_under(self, order: UnderPlan) -> None:
        known = self._speculation.told
        plan = known[order.digest] if order.plan is None else order.plan
        _keep(known, plan)
        self._verifies = order.verifies
        if order.most:
            self._drafted = self.draft(plan, order.most)
        else:
            self.measure(plan)

    def _follow(self, order: Block) -> bool:
        if order.tokens is not None:
            drafts = Drafts(torch.tensor(order.tokens, device="cpu"), kind=order.kind)
        else:
            assert self._drafted is not None
            drafts = self._drafted.columns(0, order.count)
        self._verifies = order.verifies
        if self.budget is not None and self.budget.coin is not None:
            self.budget.coin.tossed = order.tossed
        return self.block(order.name, drafts)[1]

    def _listen(self) -> Order:
        order: Order = self._model._adaskip.ranks.first(_WHAT, Stop)
        if isinstance(order, Failed):
            self._failure = order.error
            raise order.error
        return order


def _keep(known: dict[str, SkipPlan], plan: SkipPlan) -> None:
    """Know a plan by its digest from now on, on all ranks alike."""
    if len(known) >= _KEPT and plan.digest not in known:
        known.clear()
    known[plan.digest] = plan


def _begin_alike(drafts: Drafts, own: Drafts | None) -> bool:
    """Return whether drafts are those that the model has decoded, or the first of these."""
    if own is None or own.logits is None or drafts.logits is None:
        return False
    same = drafts.logits.data_ptr() == own.logits.data_ptr()
    return same and drafts.tokens.data_ptr() == own.tokens.data_ptr()
