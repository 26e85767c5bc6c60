"""Matrices over texts: calibrated on one, used on another (the paper's Table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .source import Document, items, place
from .style import PlotError, heat, number_cells

HOW = (
    "a matrix picture is drawn from 'panels' with title, rows, columns and values, as "
    "`python -m benchmarks run study_transfer` and study_domain write them"
)


def figure(documents: Sequence[Document], make: Any) -> Any:
    """One heat map a panel, all on one scale, the value in every cell. PlotError for other data.

    Documents may say ``value_name``, ``row_name`` and ``column_name``, which label the axes.
    """
    panels = items(documents, "panels", ("title", "rows", "columns", "values"), HOW)
    everything = np.concatenate([_values(panel).ravel() for panel in panels])
    low, high = float(np.nanmin(everything)), float(np.nanmax(everything))
    size = 1.3 + 0.62 * max(len(p["columns"]) for p in panels)
    tall = 1.7 + 0.5 * max(len(p["rows"]) for p in panels)
    drawn = make(figsize=(size * len(panels) + 1.6, tall), layout="constrained")
    axes = drawn.subplots(1, len(panels), squeeze=False)[0]
    for i, (one, panel) in enumerate(zip(axes, panels, strict=True)):
        image = heat(one, _values(panel), low, high if high > low else low + 1)
        number_cells(one, _values(panel), image, "{:.2f}", 8)
        one.set_xticks(range(len(panel["columns"])), panel["columns"], rotation=35, ha="right")
        one.set_yticks(range(len(panel["rows"])), panel["rows"] if i == 0 else [])
        one.set(title=panel["title"], xlabel=documents[0].get("column_name", ""))
    axes[0].set_ylabel(documents[0].get("row_name", ""))
    drawn.colorbar(image, ax=list(axes), label=documents[0].get("value_name", ""), pad=0.02)
    drawn.suptitle(place(documents) or None, fontsize=10)
    return drawn


def _values(panel: Document) -> np.ndarray[Any, Any]:
    values = np.array(panel["values"], dtype=float)
    expected = (len(panel["rows"]), len(panel["columns"]))
    if values.shape != expected:
        raise PlotError(
            f"panel {panel['title']!r} has {list(values.shape)} values for {list(expected)} rows "
            "and columns; write the study's result again"
        )
    return values
