"""What drafts have come to: how many were proposed and accepted, by proposer and position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sampled import Sampled


@dataclass
class Proposed:
    """What one proposer has drafted, over all requests; a row of a batch counts as a text.

    Attributes:
        verifications: Steps that have verified its drafts.
        drafted: How many drafts were verified, by position: the first of each step, the second...
        accepted: How many of these were accepted, with all before them.
        kinds: The same of each kind of its drafts, by name: of those of a plan its digest.
    """

    verifications: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    kinds: dict[str, Proposed] = field(default_factory=dict)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """The share that was accepted of drafts whose predecessors were, by position."""
        reached = [self.drafted[:1], self.accepted]
        before = [*reached[0], *reached[1]]
        pairs = zip(self.accepted, self.drafted, before, strict=False)
        return tuple(taken / min(tried, had) for taken, tried, had in pairs if min(tried, had))

    def count(self, drafted: int, accepted: int, rows: int, kind: str = "") -> None:
        """Count a verification of `drafted` tokens of `rows` rows, of which `accepted` stand."""
        if kind:
            self.kinds.setdefault(kind, Proposed()).count(drafted, accepted, rows)
        self.verifications += 1
        while len(self.drafted) < drafted:
            self.drafted.append(0)
            self.accepted.append(0)
        for position in range(drafted):
            self.drafted[position] += rows
            self.accepted[position] += rows * (position < accepted)

    def __str__(self) -> str:
        """Return how often there were some, and how many stand."""
        shares = " ".join(f"{share:.2f}" for share in self.acceptance)
        return f"{self.verifications:,} times, accepted by position {shares}"


@dataclass
class DraftStats:
    """What a compiled model's drafts have come to so far, over all requests.

    Attributes:
        requests: How many there were.
        tokens: Tokens of each row that were generated, drafts that were accepted included.
        verifications: Steps of the full program that verified drafts.
        steps: Steps of the full program that had nothing to verify.
        proposers: By name.
        divergence: Mean KL(full || draft) of all tokens, in nats, where it is bounded; else None.
        worst: The greatest mean of a row of a request.
        bound: What it is bounded by.
        fell_back: Requests in which the bound refused a draft, so that tokens were the full
            program's from there on until there was something left to spend.
        weakened: How often a weaker plan was taken for drafts, since they diverged too much.
        unverified: Tokens of each row that were written as they were drafted (`verify_share`).
        estimate: The greatest estimated mean of a row of a request, its unverified tokens included.
        upper: The greatest upper bound of such a mean; see `Bounded`.
    """

    requests: int = 0
    tokens: int = 0
    verifications: int = 0
    steps: int = 0
    proposers: dict[str, Proposed] = field(default_factory=dict)
    divergence: float | None = None
    worst: float | None = None
    bound: float | None = None
    fell_back: int = 0
    weakened: int = 0
    unverified: int = 0
    estimate: float | None = None
    upper: float | None = None
    _spent: float = field(default=0.0, repr=False)
    _rows: float = field(default=0.0, repr=False)

    @property
    def tokens_per_step(self) -> float:
        """Tokens for each step of the full program, but those of prompts; 0 before the first."""
        steps = self.steps + self.verifications
        return (self.tokens - self.requests) / steps if steps else 0.0

    def count(self, name: str, drafted: int, accepted: int, rows: int, kind: str = "") -> None:
        """Count a verification of drafts of a kind by the proposer `name`."""
        self.verifications += 1
        self.proposers.setdefault(name, Proposed()).count(drafted, accepted, rows, kind)

    def diverged(
        self,
        bound: float,
        spent: Sequence[float],
        tokens: Sequence[float],
        refused: Sequence[float] = (),
    ) -> None:
        """Count a request that ended.

        Args:
            bound: of its divergence.
            spent: nats of each row.
            tokens: of each row.
            refused: how many drafts of each row were beyond the bound.
        """
        self.bound = bound
        self.fell_back += any(refused)
        self._spent, self._rows = self._spent + sum(spent), self._rows + sum(tokens)
        self.divergence = self._spent / max(self._rows, 1.0)
        means = (nats / count for nats, count in zip(spent, tokens, strict=True) if count)
        self.worst = max(self.worst or 0.0, *means)

    def sampled(
        self,
        spent: Sequence[float],
        tokens: Sequence[float],
        unverified: int,
        rows: Sequence[Sampled],
    ) -> None:
        """Count a request of which only some blocks were verified.

        Args:
            spent: nats of the verified tokens of each row.
            tokens: of each row.
            unverified: how many of these were not verified.
            rows: what they have come to.
        """
        self.unverified += unverified
        for nats, count, row in zip(spent, tokens, rows, strict=True):
            means = ((nats + more) / max(count, 1.0) for more in (row.estimate, row.upper))
            estimate, upper = means
            self.estimate = max(self.estimate or 0.0, estimate)
            self.upper = max(self.upper or 0.0, upper)

    def __str__(self) -> str:
        """Return a heading and one line for each proposer."""
        lines = [
            f"{self.tokens:,} tokens in {self.verifications:,} verifications and {self.steps:,} "
            f"plain steps, {self.tokens_per_step:.2f} tokens a step"
        ]
        for name, proposed in self.proposers.items():
            lines.append(f"{name}: {proposed}")
            if len(proposed.kinds) > 1:
                lines += [f"  {kind}: {one}" for kind, one in proposed.kinds.items()]
        if self.divergence is not None:
            lines.append(
                f"divergence {self.divergence:.2g} nats a token, {self.worst:.2g} in the worst "
                f"row, of at most {self.bound:.2g}"
            )
        if self.fell_back:
            lines.append(
                f"fell back to the full program's tokens in {self.fell_back:,} of "
                f"{self.requests:,} requests, whose drafts were beyond the bound; took a weaker "
                f"plan {self.weakened:,} times"
            )
        if self.upper is not None:
            lines.append(
                f"{self.unverified:,} tokens not verified; in the worst row the mean is about "
                f"{self.estimate:.2g} and, by confidence, at most {self.upper:.2g} nats"
            )
        return "\n".join(lines)
