"""Which drafts are accepted, and which token takes the place of the first that is not.

Sampling is speculative rejection sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1;
Chen et al. 2023, arXiv 2302.01318): a draft x that was drawn with probability q(x) is accepted with
probability min(1, p(x) / q(x)), and else a token is drawn with weights max(p - q, 0). So tokens
have the probabilities p of the full program, whatever q is.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .proposals import Drafts


@dataclass(frozen=True, eq=False)
class Column:
    """Where a block ends: one draft of each row that not all rows accept, or nothing is drafted.

    Attributes:
        scores: of the full program, processed, float32 [B, V].
        drafts: int64 [B]; anything where nothing is drafted.
        accepted: which rows accept theirs, bool [B]; none where nothing is drafted.
        probabilities: with which the drafts were drawn, float32 [B, V]: zeros where nothing is
            drafted. None where they were not drawn.
        drafted: whether there are drafts, bool [].
    """

    scores: torch.Tensor
    drafts: torch.Tensor
    accepted: torch.Tensor
    probabilities: torch.Tensor | None
    drafted: torch.Tensor

    @classmethod
    def at(
        cls, scores: torch.Tensor, drafts: Drafts, accepted: torch.Tensor, place: torch.Tensor
    ) -> Column:
        """Return a column of drafts, or what comes after all of them; the host need not know.

        Args:
            scores: float32 [B, C, V], or [B, C + 1, V] if the place may be after all drafts.
            drafts: C of each row.
            accepted: bool [B, C].
            place: int64 [], up to C.
        """
        drafted, last = place < drafts.count, place.clamp_max(drafts.count - 1).view(1)
        chances = drafts.probabilities
        if chances is not None:
            chances = chances.index_select(1, last).squeeze(1) * drafted
        return cls(
            scores.index_select(1, place.view(1)).squeeze(1),
            drafts.tokens.index_select(1, last).squeeze(1),
            accepted.index_select(1, last).squeeze(1) & drafted,
            chances,
            drafted,
        )


class Rule(Protocol):
    """How tokens are chosen by scores, and which drafts are as good as those."""

    def accepts(self, scores: torch.Tensor, drafts: Drafts, logits: torch.Tensor) -> torch.Tensor:
        """Return which drafts may stand, bool [B, C], each given that those before it do.

        Args:
            scores: of the full program, processed, float32 [B, C, V].
            drafts: C of each row.
            logits: what scores were made of, float32 [B, C, V].
        """

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a token of each row by scores [B, V], int64 [B], and whether that is impossible.

        The second is a bool tensor []; None where it cannot be.
        """

    def replace(self, column: Column) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what `choose` does, for a column of drafts that not all rows accept."""

    def settle(self, columns: torch.Tensor) -> None:
        """Take note that the first drafts of the last block stand, in each row that accepts them.

        (`columns` of them, int64 [], with that of which some rows do not.)
        """


class Greedy:
    """The token with the best score."""

    def settle(self, columns: torch.Tensor) -> None:
        """Nothing is kept of a block."""

    def accepts(self, scores: torch.Tensor, drafts: Drafts, logits: torch.Tensor) -> torch.Tensor:
        """Return which drafts are those tokens."""
        return scores.argmax(-1) == drafts.tokens

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the best token of each row."""
        return scores.argmax(-1), None

    def replace(self, column: Column) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the best token of each row: of one that accepts its draft it is the draft."""
        return self.choose(column.scores)


class Sampling:
    """A token that is drawn with the probabilities that scores are the logarithms of."""

    def settle(self, columns: torch.Tensor) -> None:
        """Nothing is kept of a block."""

    def accepts(self, scores: torch.Tensor, drafts: Drafts, logits: torch.Tensor) -> torch.Tensor:
        """Accept each draft with probability min(1, p / q)."""
        place = drafts.tokens.unsqueeze(-1)
        chances = torch.softmax(scores, -1).gather(-1, place).squeeze(-1)
        drawn = torch.rand_like(chances)
        if drafts.probabilities is not None:
            drawn = drawn * drafts.probabilities.gather(-1, place).squeeze(-1)
        return drawn < chances

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a drawn token of each row, and whether the probabilities are no numbers.

        The tokens are those that `torch.multinomial` draws of the same random numbers.
        """
        return _drawn(torch.softmax(scores, -1))

    def replace(self, column: Column) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the drafts of the rows that accept them; else a token by max(p - q, 0)."""
        chances = torch.softmax(column.scores, -1)
        if column.probabilities is None:
            left = chances.scatter(-1, column.drafts.unsqueeze(-1), 0.0)
            left = torch.where(column.drafted, left, chances)
        else:
            left = (chances - column.probabilities).clamp_min(0.0)
        # (p and q that differ by a rounding leave nothing: then q is p)
        left = torch.where(left.sum(-1, keepdim=True) > 0, left, chances)
        drawn, invalid = _drawn(left)
        return torch.where(column.accepted, column.drafts, drawn), invalid


def _drawn(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token of each row of `weights` [B, V], and whether that is impossible.

    Of exponential variables with rates p, the least is the i-th with probability p[i].
    """
    race = torch.empty_like(weights).exponential_(1)
    invalid = weights[:, 0].isnan().any()  # if one of a row is, all are
    return (weights / race).argmax(-1), invalid


def leading(accepted: torch.Tensor) -> torch.Tensor:
    """Return how many columns of bool [B, C] all rows accept before the first they do not, []."""
    return accepted.all(0).to(torch.int64).cumprod(0).sum()


def best_of_rows(
    drafts: Sequence[Sequence[int]],
    best: Sequence[Sequence[int]],
    going: Sequence[bool],
    ends: Container[int],
    padding: int | None,
) -> tuple[int, list[list[int]], list[bool]]:
    """Return which drafts are the best tokens of all rows, and what is appended.

    Appended are those that stand and the tokens after them, up to a column with which a row ends.

    Args:
        drafts: k tokens of each row.
        best: the full program's best tokens in their places, and the one after them, by row.
        going: the rows that have not ended.
        ends: the tokens that end a row.
        padding: what follows in a row that has ended, whatever its drafts are; None: its best
            tokens.

    Returns:
        How many drafts stand; the columns that are appended; the rows that go on after these.
    """
    stand = len(drafts[0])
    counts = [on or padding is None for on in going]
    for drafted, tokens, counted in zip(drafts, best, counts, strict=True):
        if counted:
            places = range(stand)
            stand = next((place for place in places if drafted[place] != tokens[place]), stand)
    kept = stand + 1
    rows = [
        list(tokens[:kept]) if counted else [padding or 0] * kept
        for tokens, counted in zip(best, counts, strict=True)
    ]
    last = [
        next((place for place, token in enumerate(row) if token in ends), kept) if on else kept
        for row, on in zip(rows, going, strict=True)
    ]
    kept = min(kept, min(last) + 1)
    after = [on and end >= kept for on, end in zip(going, last, strict=True)]
    return stand, [list(column) for column in zip(*rows, strict=True)][:kept], after
