"""Which tokens of a layer's K/V heads a request may still read: windows leave out the middle."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from ..plans.skip_plan import Action

if TYPE_CHECKING:
    from ..plans.skip_plan import Phase, SkipPlan
    from ..plans.sublayer import Sublayer
    from ..plans.windows import Window

#: Last tokens that are held beyond a window, so that as many can be taken back.
SPARE = 256


@dataclass(frozen=True)
class Retained:
    """The tokens of a K/V head that attention may read: the first ones, and the last ones.

    Attributes:
        first: how many of the first tokens (attention sinks).
        last: how many of the last tokens, a new one among them.
    """

    first: int
    last: int

    def gone(self, length: int) -> range:
        """Return which of `length` tokens need not be held, `SPARE` apart."""
        return range(self.first, max(self.first, length - self.last - SPARE))


#: By layer, of each of its K/V heads, where None means all tokens; of a layer that is empty all.
Retention: TypeAlias = tuple[tuple[Retained | None, ...], ...]


class Part(NamedTuple):
    """K/V heads of a layer that hold the same tokens.

    Attributes:
        layer: of the model.
        first, heads: the first K/V head, and how many.
    """

    layer: int
    first: int
    heads: int

    def holds(self, other: Part) -> bool:
        """Return whether all heads of another part are among its own."""
        return (
            self.layer == other.layer
            and self.first <= other.first
            and other.first + other.heads <= self.first + self.heads
        )

    def cut(self, stored: torch.Tensor, tokens: range) -> torch.Tensor:
        """Return its heads of some tokens of the layer's keys, or values, [batch, heads, ...]."""
        heads = min(self.heads, stored.shape[1] - self.first)  # (values may have fewer than keys)
        return stored.narrow(1, self.first, heads).narrow(2, tokens.start, len(tokens))

    def of(self, retention: Retention) -> Retained | None:
        """Return what is read of it; None for everything."""
        held = retention[self.layer] if self.layer < len(retention) else ()
        return together(held[self.first : self.first + self.heads])


def single_heads(layer: int, heads: int) -> list[Part]:
    """Return the parts of a layer whose K/V heads are held each by itself."""
    return [Part(layer, head, 1) for head in range(heads)]


def retention(plans: Sequence[SkipPlan], layers: int, narrow: Mapping[Sublayer, int]) -> Retention:
    """Return what a request may read that runs with any of `plans`, in any phase.

    Args:
        plans: of one model, each of whose attention sublayers reads its own layer's keys.
        layers: of the model.
        narrow: attention that reads what its window shows and no more, and its K/V heads.
    """
    found: list[tuple[Retained | None, ...]] = [()] * layers
    for sublayer, heads in narrow.items():
        windows = _windows(plans, sublayer)
        held = tuple(_of_head(windows, head) for head in range(heads))
        if any(held):
            found[sublayer.layer] = held
    return tuple(found)


def together(heads: Iterable[Retained | None]) -> Retained | None:
    """Return what is read of several K/V heads; None for everything, or of no heads."""
    held = list(heads)
    known = [retained for retained in held if retained is not None]
    if not known or len(known) < len(held):
        return None
    return Retained(max(r.first for r in known), max(r.last for r in known))


def widened(plans: Sequence[SkipPlan], plan: SkipPlan) -> Sublayer | None:
    """Return a sublayer of which a K/V head sees more under `plan` than is held by `plans`."""
    for sublayer in plan.sublayers:
        if sublayer.kind != "attention" or plan.action("decode", sublayer) is not Action.RUN:
            continue
        held, new = _windows(plans, sublayer), plan.windows.get("decode", sublayer)
        named = {head for window in (*held, new) if window for head in window.full_heads}
        for head in (*named, max(named, default=0) + 1):  # the last one stands for all others
            retained, sees = _of_head(held, head), _of_head([new], head)
            if retained is not None and (
                sees is None or sees.first > retained.first or sees.last > retained.last
            ):
                return sublayer
    return None


def _windows(plans: Sequence[SkipPlan], sublayer: Sublayer) -> list[Window | None]:
    """Return the windows of attention in each plan and phase that runs it; None for no window."""
    phases: tuple[Phase, ...] = ("prefill", "decode")
    return [
        plan.windows.get(phase, sublayer)
        for plan, phase in itertools.product(plans, phases)
        if plan.action(phase, sublayer) is Action.RUN
    ]


def _of_head(windows: Sequence[Window | None], head: int) -> Retained | None:
    """Return what is read of a K/V head through any of `windows`; None for everything."""
    return together(
        None
        if window is None or head in window.full_heads
        else Retained(window.sinks, window.tokens)
        for window in windows
    )
