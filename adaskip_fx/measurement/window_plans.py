"""Plans that say what attention with a window costs, in all of its heads and in some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..plans.skip_plan import SkipPlan, Sublayer
from ..plans.windows import Window, Windows


def window_plans(
    sublayers: tuple[Sublayer, ...],
    classes: Sequence[str],
    heads: Mapping[Sublayer, int],
    windows: Sequence[Window],
) -> list[SkipPlan]:
    """Return the plans to time.

    Args:
        sublayers: the model's, in stream order.
        classes: the class of each, as in a latency table.
        heads: how many K/V heads attention has that can have a window.
        windows: what to measure; none that names heads.

    Raises:
        ValueError: a window names heads, or no attention can have one.
    """
    groups: dict[str, list[Sublayer]] = {}
    for sublayer, name in zip(sublayers, classes, strict=True):
        if name and sublayer in heads:
            groups.setdefault(name, []).append(sublayer)
    if windows and not groups:
        raise ValueError("there is no attention whose windows could be measured")
    empty, plans = SkipPlan.empty(sublayers), list[SkipPlan]()
    for window in windows:
        if window.full_heads:
            raise ValueError(f"{window}: heads are measured apart; give a window without them")
        for group in groups.values():
            half = group[::2]
            plans.append(empty.with_windows(Windows.of(half, window)))
            # (every other one: that is where they lie between one another)
            some = {
                s: replace(window, full_heads=tuple(range(0, heads[s], 2)))
                for s in half
                if heads[s] > 1
            }
            if some:
                plans.append(empty.with_windows(Windows.of(some)))
    return plans
