"""How a compiled model decodes: what ``compile(decoding=...)`` takes."""

from __future__ import annotations

from dataclasses import dataclass

from .lookup import Lookup
from .proposals import Proposer
from .skipped import Skipped


@dataclass(frozen=True)
class Lossless:
    """Generate what the full model generates: what a plan leaves out only drafts.

    Proposers draft the next tokens, the full program reads all of them at once, and those are kept
    that it would have generated. Greedy search gives the full model's tokens, as far as its
    programs for one token and for several round alike; sampling gives tokens with the full model's
    probabilities, but others than without drafts from the same seed (Leviathan et al. 2023,
    arXiv 2211.17192).

    Attributes:
        proposers: Who drafts.
        longest: The most tokens that are drafted before they are verified, 1 to 31.
        adaptive: Whether it is measured which drafts are worth their time, and how many: nothing is
            drafted where plain steps are faster. Else the first proposer that has drafts makes
            `longest` of them, however many stand.
    """

    proposers: tuple[Proposer, ...] = (Lookup(), Skipped())
    longest: int = 15
    adaptive: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "proposers", tuple(self.proposers))
        if not self.proposers:
            raise ValueError("Lossless needs at least one proposer; without, leave decoding= out")
        if not isinstance(self.longest, int) or not 1 <= self.longest <= 31:
            raise ValueError(f"Lossless(longest=...) must be 1 to 31, got {self.longest!r}")


@dataclass(frozen=True)
class Bounded(Lossless):
    """Skip, and lose no more than a bound: tokens of a plan stand while they diverge that little.

    As `Lossless`, but a draft that the model itself has decoded under a plan stands also where the
    full program would have generated another token, as long as the mean of KL(full || draft) over
    the request's tokens stays within a bound: in nats, of raw logits at temperature 1, with each
    token's own text. The full program reads every token before it is released, and replaces its
    keys and values in all layers, so the divergence is that of the text that is written. Where it
    would be exceeded, tokens are the full program's, which have none.

    Attributes:
        proposers, longest, adaptive: see `Lossless`.
        max_divergence: The bound, above 0.
        verify_share: How many of the blocks are verified, above 0 and at most 1. Below 1 the mean
            is estimated, and only bounded with some confidence: a coin that knows nothing of the
            text decides for each block, the others are written as they were drafted, and keep the
            K/V that the plan wrote, so a plan must write those of all layers. Divergence is that of
            the full program on this cache, whose past it would have read otherwise. Where the
            estimate is beyond `max_divergence` every block is verified.
        clip: Nats that a token counts at most where not all blocks are verified.
        error: How likely the bound of a row (`DraftStats.upper`) may be exceeded, at any time of
            its request.
    """

    proposers: tuple[Proposer, ...] = (Skipped(),)
    max_divergence: float = 0.02
    verify_share: float = 1.0
    clip: float = 1.0
    error: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.verify_share <= 1:
            raise ValueError(
                f"Bounded(verify_share=...) must be above 0 and at most 1, got "
                f"{self.verify_share!r}; for tokens that nobody verifies leave decoding= out"
            )
        if not 0 < self.clip < float("inf"):
            raise ValueError(f"Bounded(clip=...) must be above 0 nats, got {self.clip!r}")
        if not 0 < self.error < 1:
            raise ValueError(f"Bounded(error=...) must be within 0 and 1, got {self.error!r}")
        if not 0 < self.max_divergence < float("inf"):
            raise ValueError(
                f"Bounded(max_divergence=...) must be above 0, got {self.max_divergence!r}; for "
                "none at all there is Lossless()"
            )
