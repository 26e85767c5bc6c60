"""Blocks of which only some are verified, and what the others may have diverged.

A coin is tossed for a block before it is drafted: with probability `share` the full program reads
it, and else it is written as it was drafted, K/V included. What the drafts of a block diverge, with
at most `clip` nats of each, is a term of a sum of which those are seen that are verified;
`confidence` bounds the sum of all. Divergence is that of the full program on the cache as it is: of
a text whose unverified tokens have the K/V that the plan gave them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .confidence import UpperBound
from .divergence import divergence
from .options import Bounded
from .proposals import Drafts


@dataclass(frozen=True)
class Sampled:
    """What one row of a request has diverged, as far as some of its blocks say.

    Attributes:
        estimate: nats of its unverified tokens, unbiased.
        upper: what those are at most, with the confidence that was asked for; a token counts
            `Bounded.clip` nats at most.
    """

    estimate: float
    upper: float


class Coin:
    """Says which blocks of one request are verified.

    Attributes:
        tokens: of each row that were not verified.
        tossed: whether the coin decided about the next block.
    """

    def __init__(self, decoding: Bounded, rows: int) -> None:
        """Begin with no block; the coin is drawn from torch's generator of the CPU."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        self._random, self._share, self._clip = (
            random.Random(seed),
            decoding.verify_share,
            decoding.clip,
        )
        most = decoding.longest * decoding.clip / decoding.verify_share
        self._bounds = [UpperBound(most, decoding.error) for _ in range(rows)]
        self.tossed = False
        self.tokens = 0

    def toss(self, allowed: bool) -> bool:
        """Return whether the next block is verified: it is where it is not `allowed` not to be."""
        self.tossed = allowed
        return not allowed or self._random.random() < self._share

    def apart(
        self, drafts: Drafts, logits: torch.Tensor, counted: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the divergence of a block that is verified, float64 [B]; None if none counts.

        Args:
            drafts: the block, with the logits of its k tokens.
            logits: of the full program for the same tokens, float32 [B, k, V].
            counted: rows that have not ended, int64 [B].
        """
        if not self.tossed or drafts.logits is None:
            return None
        each = divergence(logits, drafts.logits).to(torch.float64).clamp_max(self._clip)
        return each.sum(1) * counted

    def verified(self, apart: Sequence[float]) -> None:
        """Take the divergence of a block that was verified, by row."""
        for bound, nats in zip(self._bounds, apart, strict=True):
            bound.add(nats / self._share)

    def released(self, tokens: int) -> None:
        """Count a block of so many tokens that was not verified."""
        self.tokens += tokens
        for bound in self._bounds:
            bound.add(0.0)

    def rows(self) -> list[Sampled]:
        """Return what the unverified tokens of each row have come to."""
        unseen = 1 - self._share  # (of the sum of all terms the verified ones are known)
        return [
            Sampled(unseen * bound.estimate, unseen * bound.estimate + bound.radius)
            for bound in self._bounds
        ]
