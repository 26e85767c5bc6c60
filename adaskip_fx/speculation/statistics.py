"""What drafts have come to: how many were proposed and accepted, by proposer and position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Proposed:
    """What one proposer has drafted, over all requests; a row of a batch counts as a text.

    Attributes:
        verifications: Steps that have verified its drafts.
        drafted: How many drafts were verified, by position: the first of each step, the second...
        accepted: How many of these were accepted, with all before them.
    """

    verifications: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """The share that was accepted of drafts whose predecessors were, by position."""
        reached = [self.drafted[:1], self.accepted]
        before = [*reached[0], *reached[1]]
        pairs = zip(self.accepted, self.drafted, before, strict=False)
        return tuple(taken / min(tried, had) for taken, tried, had in pairs if min(tried, had))

    def count(self, drafted: int, accepted: int, rows: int) -> None:
        """Count a verification of `drafted` tokens of `rows` rows, of which `accepted` stand."""
        self.verifications += 1
        while len(self.drafted) < drafted:
            self.drafted.append(0)
            self.accepted.append(0)
        for position in range(drafted):
            self.drafted[position] += rows
            self.accepted[position] += rows * (position < accepted)


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
    """

    requests: int = 0
    tokens: int = 0
    verifications: int = 0
    steps: int = 0
    proposers: dict[str, Proposed] = field(default_factory=dict)
    divergence: float | None = None
    worst: float | None = None
    bound: float | None = None
    _spent: float = field(default=0.0, repr=False)
    _rows: float = field(default=0.0, repr=False)

    @property
    def tokens_per_step(self) -> float:
        """Tokens for each step of the full program, but those of prompts; 0 before the first."""
        steps = self.steps + self.verifications
        return (self.tokens - self.requests) / steps if steps else 0.0

    def count(self, name: str, drafted: int, accepted: int, rows: int) -> None:
        """Count a verification of drafts by the proposer `name`."""
        self.verifications += 1
        self.proposers.setdefault(name, Proposed()).count(drafted, accepted, rows)

    def diverged(self, bound: float, spent: Sequence[float], tokens: Sequence[float]) -> None:
        """Count a request whose rows have so many tokens, with divergence of so many nats."""
        self.bound = bound
        self._spent, self._rows = self._spent + sum(spent), self._rows + sum(tokens)
        self.divergence = self._spent / max(self._rows, 1.0)
        means = (nats / count for nats, count in zip(spent, tokens, strict=True) if count)
        self.worst = max(self.worst or 0.0, *means)

    def __str__(self) -> str:
        """Return a heading and one line for each proposer."""
        lines = [
            f"{self.tokens:,} tokens in {self.verifications:,} verifications and {self.steps:,} "
            f"plain steps, {self.tokens_per_step:.2f} tokens a step"
        ]
        for name, proposed in self.proposers.items():
            shares = " ".join(f"{share:.2f}" for share in proposed.acceptance)
            lines.append(f"{name}: {proposed.verifications:,} times, accepted by position {shares}")
        if self.divergence is not None:
            lines.append(
                f"divergence {self.divergence:.2g} nats a token, {self.worst:.2g} in the worst "
                f"row, of at most {self.bound:.2g}"
            )
        return "\n".join(lines)
