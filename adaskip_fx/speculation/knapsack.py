"""KnapSpec's choice: the sublayers whose absence costs least likeness for the time that it saves.

Cha et al. 2026, "KnapSpec: Self-Speculative Decoding via Adaptive Layer Selection as a Knapsack
Problem", arXiv 2602.20217: attention and FFNs are items of a knapsack, what they save is their
measured latency, which for attention grows with the stored tokens, and the cosine similarity of
hidden states stands for the rate of acceptance. Of the choices for several savings that is taken
which gives most tokens for its time.

Here a set's similarity is the product of what calibration measured of each of its sublayers, where
the authors run their dynamic program over hidden states of the text; so nothing is measured while
text is written, and the plan changes with the length of the text alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..latency.knapsack import choose
from ..latency.table import LatencyTable
from ..plans.skip_plan import SkipPlan
from .refinement import Space


@dataclass(frozen=True)
class KnapSpec:
    """Refine by the knapsack: of each length the plan that seems to give most tokens for its time.

    Attributes:
        table: What sublayers cost on this device (`adaskip-fx measure`), in decode at two lengths
            or more; lengths beyond those count as the nearest one.
        drafts: How many drafts a block is supposed to have.
        savings: For how many shares of the sublayers' time a set is chosen.

    Raises:
        ValueError: A number means nothing.
    """

    table: LatencyTable
    drafts: int = 7
    savings: int = 15

    def __post_init__(self) -> None:
        for name in ("drafts", "savings"):
            if getattr(self, name) < 1:
                raise ValueError(f"KnapSpec({name}=...) must be at least 1")

    def begin(self, space: Space) -> KnapSpecChoice:
        """Return the choice for one model.

        Raises:
            ValueError: There is no profile, which tells how similar sublayers leave the stream.
            TableError: The table is of another model.
        """
        if space.similarity is None:
            raise ValueError(
                "KnapSpec needs to know how similar sublayers leave the stream: give compile a "
                "profile"
            )
        return KnapSpecChoice(self, space)


class KnapSpecChoice:
    """The plans of one model, by length."""

    def __init__(self, options: KnapSpec, space: Space) -> None:
        """Begin with no length seen."""
        self._options, self._space = options, space
        self._plans = dict[int, SkipPlan]()
        options.table.seconds(SkipPlan.empty(space.plan.sublayers), "decode", self._context(0))

    def plan(self, stored: int) -> SkipPlan:
        """Return the plan for so many stored tokens, to a power of two."""
        octave = stored.bit_length()
        if octave not in self._plans:
            self._plans[octave] = self._chosen(self._context(stored))
        return self._plans[octave]

    def candidate(self) -> None:
        """Return None: nothing is measured."""

    def measured(self, plan: SkipPlan, matchness: float) -> None:
        """Do nothing: there are no candidates."""

    def _context(self, stored: int) -> int:
        """Return the length that counts, which is within those that were measured."""
        known = [c.context for c in self._options.table.costs if c.phase == "decode"]
        return min(max(stored, min(known)), max(known))

    def _chosen(self, context: int) -> SkipPlan:
        table, space, options = self._options.table, self._space, self._options
        assert space.similarity is not None
        classes = dict(zip(table.sublayers, table.classes, strict=True))
        items = [s for s in space.skippable if classes[s]]
        costs = table.at("decode", context)
        savings = [costs[classes[s]] for s in items]
        losses = [-math.log(min(max(space.similarity[s], 1e-6), 1.0)) for s in items]
        full = table.seconds(SkipPlan.empty(table.sublayers), "decode", context)
        best, plan = 1 / full, SkipPlan.empty(space.plan.sublayers)
        most = sum(savings) - min(savings)  # one sublayer runs at least
        for part in range(1, options.savings + 1):
            need = most * part / options.savings
            chosen = choose(losses, [[s] for s in savings], [need])
            saved = sum(savings[i] for i in chosen)
            likeness = math.exp(-sum(losses[i] for i in chosen))
            worth = throughput(likeness, options.drafts, full - saved, full)
            if worth > best:
                best, plan = worth, space.skipping([items[i] for i in chosen])
        return plan


def throughput(accepted: float, drafts: int, draft: float, verify: float) -> float:
    """Return the tokens a second of blocks.

    Args:
        accepted: how likely a draft is to stand, if those before it do.
        drafts: of a block.
        draft: seconds of each.
        verify: seconds of their verification.
    """
    return sum(accepted**i for i in range(drafts + 1)) / (drafts * draft + verify)
