"""Which K/V heads see windows, and in which order they got them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaskip_fx.plans.sublayer import Sublayer

from .source import Document, items, place
from .style import heat

HOW = (
    "a map of heads is drawn from 'maps' with name, heads (of each attention sublayer) and order "
    "(sublayer and heads, step by step), as `python -m benchmarks run study_windows` writes them"
)


def shades(entry: Mapping[str, Any]) -> list[list[float]]:
    """Values [heads, layers]: 1 for the head that got its window first, falling to 0 for none.

    A layer without such a head has NaN.
    """
    layers = [Sublayer.parse(name).layer for name in entry["heads"]]
    rows = max(entry["heads"].values())
    values = [[float("nan")] * (max(layers) + 1) for _ in range(rows)]
    for name, count in entry["heads"].items():
        for head in range(count):
            values[head][Sublayer.parse(name).layer] = 0.0
    steps = len(entry["order"])
    for step, (name, heads) in enumerate(entry["order"]):
        for head in heads:
            values[head][Sublayer.parse(name).layer] = 1 - 0.8 * step / max(steps, 1)
    return values


def figure(documents: Sequence[Document], make: Any) -> Any:
    """One panel for each map: K/V heads down, layers across. PlotError for other data."""
    maps = items(documents, "maps", ("name", "heads", "order"), HOW)
    tallest = max(max(entry["heads"].values()) for entry in maps)
    drawn = make(figsize=(8, 0.7 + len(maps) * (0.7 + 0.18 * tallest)), layout="constrained")
    panels = drawn.subplots(len(maps), 1, squeeze=False)[:, 0]
    for axes, entry in zip(panels, maps, strict=True):
        image = heat(axes, shades(entry), 0.0, 1.0)
        axes.set_title(f"{entry['name']}: dark got a window early, white sees everything")
        axes.set(xlabel="layer", ylabel="K/V head")
        axes.set_yticks(range(max(entry["heads"].values())))
    drawn.colorbar(image, ax=list(panels), ticks=[], shrink=0.8)
    drawn.suptitle(place(documents) or None, fontsize=10)
    return drawn
