"""How soon the decode window knows what a long one would say (the paper's Table 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .source import Document, items, place
from .style import look, plain

HOW = (
    "a window picture is drawn from 'rows' with text, window, hit_rate, precision and recall, "
    "as `python -m benchmarks run study_window` writes them"
)
_PANELS = (
    ("hit_rate", "of the most similar by the window, share that is right"),
    ("precision", "of what the window adds, share that is right"),
    ("recall", "of what is right, share that the window adds"),
)


def figure(documents: Sequence[Document], make: Any) -> Any:
    """Three shares against P, a line for each text. PlotError for other data."""
    rows = items(documents, "rows", ("text", "window", *(key for key, _ in _PANELS)), HOW)
    drawn = make(figsize=(12.5, 4), layout="constrained")
    for axes, (key, label) in zip(drawn.subplots(1, 3, sharey=True), _PANELS, strict=True):
        for i, text in enumerate(dict.fromkeys(row["text"] for row in rows)):
            mine = sorted((r for r in rows if r["text"] == text), key=lambda r: int(r["window"]))
            at = [r["window"] for r in mine]
            shares = [np.nan if r[key] is None else r[key] for r in mine]
            axes.plot(at, shares, label=text, markersize=6, **look(i))
        windows = sorted({int(row["window"]) for row in rows})
        axes.set_xscale("log")
        axes.set_xticks(windows, [str(w) for w in windows])
        axes.minorticks_off()
        axes.set(xlabel="window P, decoded tokens", ylabel=label, ylim=(-0.04, 1.04))
        plain(axes)
    drawn.axes[0].legend(frameon=False, handlelength=3.5, loc="lower right")
    drawn.suptitle(place(documents) or None, fontsize=10)
    return drawn
