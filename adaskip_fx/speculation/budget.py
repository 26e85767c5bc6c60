"""What one request may diverge: the rule that keeps to it, and the plans that spend it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ..parallel.ranks import Ranks
from ..plans.decisions import left_out
from ..plans.skip_plan import SkipPlan
from .acceptance import Rule
from .divergence import Spent, Within
from .frontier import Frontier
from .options import Bounded
from .proposals import Drafts
from .sampled import Coin
from .speculation import Speculation

logger = logging.getLogger(__name__)


class Budget:
    """The bound of one request.

    Attributes:
        within: the rule by which its drafts stand.
        coin: which blocks are verified; None if all are.
    """

    def __init__(
        self,
        rule: Rule,
        decoding: Bounded,
        speculation: Speculation,
        ids: torch.Tensor,
        ranks: Ranks | None = None,
    ) -> None:
        """Begin with nothing spent.

        Args:
            rule: by which drafts stand that the bound does not allow.
            decoding: has the bound.
            speculation: of the model.
            ids: the prompt, int64 [B, T].
            ranks: that run the model together; what rank 0 has measured counts. None: one process.
        """
        self._ranks = ranks if ranks is not None else Ranks()
        self.within = Within(rule, decoding.max_divergence, ids.shape[0], ids.device)
        self.coin = Coin(decoding, ids.shape[0]) if decoding.verify_share < 1 else None
        self._left = -1.0  # so that the first block is verified
        self._apart: torch.Tensor | None = None  # what the coin is told of the block
        self._block = Spent(0.0, 0, False, 0.0)  # the last one
        self._speculation = speculation
        self._frontiers: dict[SkipPlan, Frontier] = {}
        self._fell_back = False

    def due(self, plan: SkipPlan, weaker: Sequence[SkipPlan] | None) -> SkipPlan:
        """Return the plan to draft with; see `Context.due`."""
        if plan not in self._frontiers:
            plans = self._speculation.frontier(plan, weaker)
            self._frontiers[plan] = Frontier(plans, self.within.most)
        return self._frontiers[plan].plan

    def toss(self) -> bool:
        """Return whether the next block is verified; asked before it is drafted."""
        return self.coin is None or self.coin.toss(self._left >= 0)

    def verify(self, drafts: Drafts, logits: torch.Tensor) -> None:
        """See a block that is verified, with logits of the full program, float32 [B, k, V]."""
        if self.coin is not None:
            self._apart = self.coin.apart(drafts, logits, self.within.counted)

    def told(self) -> torch.Tensor:
        """Return what the host has to know of the block that was settled, float64 [4 or 5, B]."""
        block = self.within.block()
        if self._apart is not None:
            block = torch.cat((block, self._apart.unsqueeze(0)))
        return self._ranks.of_first(block)

    def know(self, told: Sequence[Sequence[float]]) -> None:
        """Take what `told` has returned, as soon as the host has read it."""
        *block, apart = told if self._apart is not None else (*told, ())
        reserved = [0.0] * len(block[0])
        if self.coin is not None:
            if self._apart is not None:
                self.coin.verified(apart)
            reserved = [row.estimate for row in self.coin.rows()]
            self.within.reserved = torch.tensor(reserved).to(self.within.spent)
        self._block, self._apart = Spent.of(block, reserved), None

    def verified(self, plan: SkipPlan, tokens: int) -> SkipPlan:
        """Take note of a block of drafts by `plan`; returns what is drafted with next."""
        block = self._block
        self._left = block.left
        if block.refused and not self._fell_back:
            self._fell_back = True
            logger.info(
                "a draft was beyond the bound of %g nats a token: the full program's token stands",
                self.within.most,
            )
        frontier = next((f for f in self._frontiers.values() if f.plan == plan), None)
        if frontier is None or not frontier.verified(block, tokens):
            return plan
        logger.info(
            "drafts go on with plan %s (%s), since those of plan %s %s",
            frontier.plan.digest[:8],
            left_out(frontier.plan),
            plan.digest[:8],
            "diverge too much" if frontier.plan < plan else "leave something to spend",
        )
        return frontier.plan

    def end(self) -> None:
        """Count what the request has spent, in the statistics of the model."""
        within, stats = self.within, self._speculation.stats
        spent = torch.stack((within.spent, within.tokens, within.beyond))
        paid = self._ranks.of_first(spent).tolist()
        stats.diverged(within.most, *paid)
        logger.info(
            "diverged %.2g nats a token in the worst row, of at most %g",
            max(nats / max(count, 1.0) for nats, count in zip(*paid[:2], strict=True)),
            within.most,
        )
        if self.coin is not None:
            stats.sampled(paid[0], paid[1], self.coin.tokens, self.coin.rows())
        stats.weakened += self._ranks.first("what drafts have spent", self._weakened)

    def _weakened(self) -> int:
        return sum(frontier.weakened for frontier in self._frontiers.values())
