"""What a proposer is: it drafts the next tokens of a request, by itself or with the model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from ..plans.skip_plan import SkipPlan
    from .refinement import Refine


@dataclass(frozen=True, eq=False)
class Drafts:
    """Tokens that may follow a text, for the full program to verify.

    Attributes:
        tokens: int64 [B, k], k at least 1; on the host or the model's device.
        probabilities: float32 [B, k, V], with which each token was drawn, given those before it;
            None where nothing was drawn: each token is what its proposer always proposes.
        kind: drafts of a proposer that are accepted about as often have the same word here.
        chance: how likely the first token is to stand, as long as none of this kind was verified.
        logits: that the model itself gave for each token, float32 [B, k, V]; None of any other.
        plan: that the model itself decoded them with; None of any other.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor | None = None
    kind: str = ""
    chance: float = 0.8
    logits: torch.Tensor | None = None
    plan: SkipPlan | None = None

    @classmethod
    def on_host(cls, rows: list[list[int]], kind: str, chance: float) -> Drafts:
        """Return drafts that the host knows, by row, so that they need not be read again."""
        drafts = cls(torch.tensor(rows, device="cpu"), kind=kind, chance=chance)
        vars(drafts)["listed"] = rows
        return drafts

    @property
    def count(self) -> int:
        """How many tokens of each row, k."""
        return self.tokens.shape[1]

    @functools.cached_property
    def listed(self) -> list[list[int]]:
        """Their tokens as the host's own, by row."""
        listed: list[list[int]] = self.tokens.tolist()
        return listed

    def on(self, device: torch.device) -> Drafts:
        """Return the same with tokens on a device, without waiting for what runs there."""
        if self.tokens.device == device:
            return self
        return replace(self, tokens=self.tokens.to(device, non_blocking=True))

    def after(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the last tokens of a text's rows and these, which are on the host, [B, k + 1]."""
        known = zip(rows, self.listed, strict=True)
        return torch.tensor([[row[-1], *tokens] for row, tokens in known], device="cpu")

    def columns(self, first: int, end: int) -> Drafts:
        """Return those from `first` up to `end`, exclusively."""
        if first == 0 and end == self.count:
            return self
        probabilities, logits = self.probabilities, self.logits
        some = replace(
            self,
            tokens=self.tokens[:, first:end],
            probabilities=None if probabilities is None else probabilities[:, first:end],
            logits=None if logits is None else logits[:, first:end],
        )
        if "listed" in vars(self):
            vars(some)["listed"] = [row[first:end] for row in self.listed]
        return some


class Context(Protocol):
    """A request as proposers see it, between two of its tokens."""

    @property
    def input_ids(self) -> torch.Tensor:
        """The tokens so far, int64 [B, T], on the model's device."""

    @property
    def rows(self) -> Sequence[Sequence[int]]:
        """The same tokens on the host, by row, or all but the last; they grow during a request."""

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; else the best ones are taken."""

    @property
    def plan(self) -> SkipPlan:
        """What `compile` chose to leave out; nothing where it was given no profile and no plan."""

    def due(self, plan: SkipPlan, weaker: Sequence[SkipPlan] | None) -> SkipPlan:
        """Return the plan to draft with: `plan`, or a weaker one where it diverges too much.

        That is so within a bound alone; else it is `plan`.

        Args:
            plan: the strongest.
            weaker: others, which leave out less and less; None for some that leave out the least
                important of the same sublayers, as far as there is a profile that says so.
        """

    def refined(self, plan: SkipPlan, refine: Refine) -> SkipPlan:
        """Return what a plan has been refined to by now, in all requests of the model.

        Whoever has asked once has its candidates measured on this request as well.
        """

    def draft(self, plan: SkipPlan, most: int) -> Drafts | None:
        """Return `most` tokens as the model decodes them under `plan`, on the request's cache.

        Its K/V are forgotten again. None where the request does not store what the plan reads.
        """


class Drafter(Protocol):
    """Proposes for one request."""

    def propose(self, context: Context, most: int) -> Drafts | None:
        """Return up to `most` tokens that may follow; None where there is nothing to propose.

        Whose proposals are not free is asked less and less often in a request after None, until
        there is something.
        """


class Proposer(Protocol):
    """A way to propose, for any request.

    Attributes:
        name: what statistics call it.
        free: whether it costs nothing to ask, next to a step of the model.
    """

    @property
    def name(self) -> str:
        """See the class."""

    @property
    def free(self) -> bool:
        """See the class."""

    def begin(self) -> Drafter:
        """Return what proposes for a new request."""
