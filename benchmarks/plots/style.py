"""How all pictures look: readable in black and white, the same bytes from the same data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: (marker, line, colour) of one series after another: each differs without its colour too
LOOKS = (
    ("o", "-", "#0b3c6f"),
    ("s", "--", "#b8420f"),
    ("^", "-.", "#2e7d32"),
    ("D", ":", "#6a3d9a"),
    ("v", (0, (7, 2)), "#8c6d1f"),
    ("P", (0, (3, 1, 1, 1)), "#1b8a8f"),
    ("X", (0, (1, 1)), "#444444"),
    ("<", (0, (5, 1)), "#a0266b"),
    (">", (0, (3, 2, 1, 2)), "#5b7f00"),
    ("h", (0, (2, 2)), "#7a4b2a"),
    ("p", (0, (6, 1, 1, 1)), "#3f51b5"),
    ("*", (0, (4, 4)), "#000000"),
    ("d", (0, (8, 1, 1, 1)), "#c2185b"),
    ("H", (0, (1, 3)), "#5d4037"),
)
GREYS = "Greys"  # of a heat map: printed without colour it says the same
_SETTINGS: Any = {
    "svg.hashsalt": "adaskip_fx",
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.7,
}


class PlotError(ValueError):
    """What was given cannot be drawn; says what is missing and what writes it."""


def look(index: int) -> dict[str, Any]:
    """Marker, line and colour of series `index`."""
    marker, line, colour = LOOKS[index % len(LOOKS)]
    return {"marker": marker, "linestyle": line, "color": colour}


@contextlib.contextmanager
def drawing() -> Iterator[Any]:
    """matplotlib's ``Figure`` under our settings; no window is ever opened.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise PlotError(
            "pictures need matplotlib, which is not installed. Run: pip install 'adaskip-fx[plot]'"
        ) from None
    with matplotlib.rc_context(_SETTINGS):
        yield Figure


def write(figure: Any, folder: Path, name: str) -> list[Path]:
    """Save a figure as ``name.svg`` and ``name.png`` in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=150, metadata={"Software": None})
    return paths


def plain(axes: Any) -> None:
    """A light grid, and no frame above and to the right."""
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def heat(axes: Any, values: Any, low: float, high: float) -> Any:
    """A heat map of `values` [rows, columns] between two limits; missing ones are crossed out."""
    import numpy as np

    shown = np.ma.masked_invalid(np.asarray(values, dtype=float))
    image = axes.imshow(shown, cmap=GREYS, vmin=low, vmax=high, aspect="auto")
    rows, columns = shown.shape
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image


def number_cells(axes: Any, values: Any, image: Any, text: str, size: float) -> None:
    """Write each value of a heat map into its cell, white on dark ones.

    text: a format, such as ``"{:.2f}"``.
    """
    import numpy as np

    for (row, column), value in np.ndenumerate(np.asarray(values, dtype=float)):
        if np.isfinite(value):
            dark = image.norm(value) > 0.55
            axes.text(
                column,
                row,
                text.format(value),
                ha="center",
                va="center",
                fontsize=size,
                color="white" if dark else "black",
            )
