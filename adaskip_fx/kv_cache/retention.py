"""Which tokens of a layer a request may still read: windows leave out those in the middle."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..plans.skip_plan import Action

if TYPE_CHECKING:
    from ..plans.skip_plan import SkipPlan
    from ..plans.sublayer import Sublayer

#: Last tokens that are held beyond a window, so that as many can be taken back.
SPARE = 256


@dataclass(frozen=True)
class Retained:
    """The tokens of a layer that attention may read: the first ones, and the last ones.

    Attributes:
        first: how many of the first tokens (attention sinks).
        last: how many of the last tokens, a new one among them.
    """

    first: int
    last: int

    def gone(self, length: int) -> range:
        """Return which of `length` tokens need not be held, `SPARE` apart."""
        return range(self.first, max(self.first, length - self.last - SPARE))


#: By layer; None where all tokens are read.
Retention = tuple[Retained | None, ...]


def retention(plans: Sequence[SkipPlan], layers: int, narrow: Collection[Sublayer]) -> Retention:
    """Return what a request may read that runs with any of `plans`, in any phase.

    Args:
        plans: of one model, each of whose attention sublayers reads its own layer's keys.
        layers: of the model.
        narrow: attention that reads what its window shows and no more.
    """
    found: list[Retained | None] = [None] * layers
    for sublayer in narrow:
        found[sublayer.layer] = _of(plans, sublayer)
    return tuple(found)


def widened(plans: Sequence[SkipPlan], plan: SkipPlan) -> Sublayer | None:
    """Return a sublayer whose attention sees more under `plan` than `plans` have held for it."""
    for sublayer in plan.sublayers:
        held = _of(plans, sublayer) if sublayer.kind == "attention" else None
        if held is not None and plan.action("decode", sublayer) is Action.RUN:
            window = plan.windows.get("decode", sublayer)
            if window is None or window.full_heads:
                return sublayer
            if window.sinks > held.first or window.tokens > held.last:
                return sublayer
    return None


def _of(plans: Sequence[SkipPlan], sublayer: Sublayer) -> Retained | None:
    """Return what is read of one layer; None for everything, or nothing."""
    first = last = 0
    for plan in plans:
        for phase in ("prefill", "decode"):
            if plan.action(phase, sublayer) is Action.RUN:
                window = plan.windows.get(phase, sublayer)
                if window is None or window.full_heads:
                    return None
                first, last = max(first, window.sinks), max(last, window.tokens)
    return Retained(first, last) if last else None
