"""Drafts that may differ from the full program, as long as they differ little on the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .acceptance import Column, Rule
from .proposals import Drafts


def divergence(full: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """Return KL(full || draft) in nats, of logits [B, C, V] at temperature 1; float32 [B, C]."""
    ours, theirs = torch.log_softmax(full, -1), torch.log_softmax(draft, -1)
    # (a probability of zero adds nothing, also where both are zero)
    parts = torch.where(ours > -torch.inf, ours.exp() * (ours - theirs), 0.0)
    return parts.sum(-1).clamp_min(0.0)


@dataclass(frozen=True)
class Spent:
    """What one block of drafts has cost.

    Attributes:
        nats: of the drafts that were verified, in the row where that is most.
        drafts: how many those are, up to the first that does not stand and with it.
        refused: whether one was beyond the bound.
        left: nats that may be spent from here on, of the row where that is least.
    """

    nats: float
    drafts: int
    refused: bool
    left: float

    @classmethod
    def of(cls, block: Sequence[Sequence[float]], reserved: Sequence[float]) -> Spent:
        """Return it as `Within.block` says, read by the host, less what each row has reserved."""
        columns, apart, refused, left = block
        rest = (nats - kept for nats, kept in zip(left, reserved, strict=True))
        return cls(max(apart), int(columns[0]), any(refused), min(rest))


class Within:
    """Accepts drafts while their mean divergence is within a bound, and by another rule beyond it.

    A draft that stands by the bound costs its divergence; a token that the other rule accepts or
    chooses is the full program's and costs nothing. So after each token of a row the sum of what
    was paid is at most the bound times its tokens.

    Attributes:
        most: the bound, in nats for each token.
        spent: what was paid, in nats, float64 [B].
        tokens: how many tokens have been released, float64 [B].
        counted: of which rows tokens are released, int64 [B]; the others have ended.
        beyond: how many drafts the bound has refused that all before them stood, float64 [B].
        reserved: nats that others may have spent, float64 [B].
    """

    def __init__(self, rule: Rule, most: float, rows: int, device: torch.device) -> None:
        """Begin with nothing paid.

        Args:
            rule: the other one.
            most: the bound, in nats for each token.
            rows: of the request.
            device: where its tokens are.
        """
        self._rule, self.most = rule, most
        self.spent = torch.zeros(rows, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.float64, device=device)
        self.counted = torch.ones(rows, dtype=torch.int64, device=device)
        self.beyond, self.reserved = torch.zeros_like(self.spent), torch.zeros_like(self.spent)
        self._costs = list[torch.Tensor]()  # of the block that is being verified, by column
        self._apart = list[torch.Tensor]()  # likewise: what drafts cost that do not stand as well
        self._refused = list[torch.Tensor]()  # likewise: whether a draft was beyond the bound
        self._block = list[torch.Tensor]()  # what `block` is made of
        self._before = self.tokens  # it

    def accepts(self, scores: torch.Tensor, drafts: Drafts, logits: torch.Tensor) -> torch.Tensor:
        """Return which drafts may stand; those of another model by the other rule alone."""
        if not self._costs:
            self._before = self.tokens
        stand = self._rule.accepts(scores, drafts, logits)
        if drafts.logits is None:
            nothing = [torch.zeros_like(self.spent)] * drafts.count
            for kept in (self._costs, self._apart, self._refused):
                kept += nothing
            return stand
        apart = divergence(logits, drafts.logits).to(torch.float64)
        allowed = list[torch.Tensor]()
        for cost in (apart * self.counted.unsqueeze(1)).unbind(1):
            paid = self.spent + sum(self._costs, self.reserved) + cost
            allowed.append(paid <= self.most * (self._before + len(self._costs) + 1))
            self._costs.append(torch.where(allowed[-1], cost, 0.0))
            self._apart.append(cost)
            self._refused.append((~allowed[-1]).to(torch.float64))
        return stand | torch.stack(allowed, 1)

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the other rule chooses."""
        return self._rule.choose(scores)

    def replace(self, column: Column) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the drafts of the rows that accept them, and what the other rule puts in place."""
        tokens, invalid = self._rule.replace(column)
        return torch.where(column.accepted, column.drafts, tokens), invalid

    def settle(self, columns: torch.Tensor) -> None:
        """Pay for the drafts that stand."""
        kept = (self._costs, self._apart, self._refused)
        each = torch.stack([torch.stack(columns_of) for columns_of in kept])  # [3, C, B]
        stand = torch.arange(each.shape[1], device=each.device) < columns
        paid, apart, refused = torch.where(stand.view(1, -1, 1), each, 0.0).sum(1)
        self.spent, self.beyond = self.spent + paid, self.beyond + refused
        self._block = [columns.to(torch.float64).expand_as(paid), apart, refused]
        for columns_of in kept:
            columns_of.clear()

    def block(self) -> torch.Tensor:
        """Return what the last block has cost that was settled, for `Spent.of`: float64 [4, B]."""
        left = torch.where(self.counted > 0, self.most * self.tokens - self.spent, torch.inf)
        return torch.stack((*self._block, left))
