"""How alike the residual stream is before and after each sublayer (the paper's first figure)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from adaskip_fx.plans.sublayer import Kind, Sublayer

from .source import Document, items, place
from .style import heat, look, number_cells, plain

HOW = (
    "a similarity picture is drawn from profiles, or from 'rows' with name, sublayers, mean, low "
    "and high, as `python -m benchmarks run study_similarity` writes them"
)
_NUMBERED = 40  # layers: more leave no room for numbers
_LIGHT = 0.1  # the share of sublayers that may be lighter than the scale's end
_LEAST = 1e-5  # of 1 - similarity, which a log scale needs to be positive


def figure(documents: Sequence[Document], make: Any) -> Any:
    """A heat map (darker: more alike) above a chart with spreads, for each kind of model.

    Rows of one family and equal sublayers share a heat map, a line of it each. PlotError for other
    data.
    """
    rows = items(documents, "rows", ("name", "sublayers", "mean", "low", "high"), HOW)
    groups: dict[tuple[str, ...], list[Document]] = {}
    for row in rows:
        groups.setdefault((row.get("family", ""), *row["sublayers"]), []).append(row)
    heights: list[float] = []
    for (_, *names), group in groups.items():
        heights += [0.8 + 0.26 * len(group) * len(_kinds(names)), 2.6]
    drawn = make(figsize=(11, sum(heights) + 0.6), layout="constrained")
    axes = drawn.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for i, ((family, *names), group) in enumerate(groups.items()):
        image = _map(axes[2 * i], names, group)
        drawn.colorbar(image, ax=axes[2 * i], label="similarity", extend="min", pad=0.01)
        _chart(axes[2 * i + 1], names, group)
        axes[2 * i].set_title(family)
    drawn.suptitle(place(documents) or None, fontsize=10)
    return drawn


def _kinds(names: Sequence[str]) -> list[str]:
    return [k for k in get_args(Kind) if any(Sublayer.parse(n).kind == k for n in names)]


def _of_kind(names: Sequence[str], values: Sequence[float], kind: str) -> np.ndarray[Any, Any]:
    """[layers] values of one kind; NaN where a layer has none."""
    parsed = [Sublayer.parse(name) for name in names]
    found = np.full(max(s.layer for s in parsed) + 1, np.nan)
    for sublayer, value in zip(parsed, values, strict=True):
        if sublayer.kind == kind:
            found[sublayer.layer] = value
    return found


def _map(axes: Any, names: Sequence[str], group: Sequence[Document]) -> Any:
    labels = [f"{kind}, {row['name']}" for kind in _kinds(names) for row in group]
    values = [_of_kind(names, row["mean"], kind) for kind in _kinds(names) for row in group]
    low = float(np.nanquantile(values, _LIGHT))
    image = heat(axes, values, min(low, 0.999), 1.0)
    if len(values[0]) <= _NUMBERED:
        number_cells(axes, 100 * np.array(values), _Percent(image), "{:.1f}", 6)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xticks(range(0, len(values[0]), 1 if len(values[0]) <= _NUMBERED else 4))
    axes.set_xlabel("layer (numbers: similarity in percent)")
    return image


class _Percent:
    """The shades of a heat map, asked for by percent."""

    def __init__(self, image: Any) -> None:
        self._image = image

    def norm(self, value: float) -> float:
        return float(self._image.norm(value / 100))


def _chart(axes: Any, names: Sequence[str], group: Sequence[Document]) -> None:
    """The mean over the rows; bars from the least to the greatest quantile of any row.

    What is drawn is 1 - similarity on a log scale that points down: most are close to 1.
    """
    for i, kind in enumerate(_kinds(names)):
        mean, low, high = (
            np.array([1 - _of_kind(names, row[key], kind) for row in group]).clip(_LEAST)
            for key in ("mean", "low", "high")
        )
        middle, bottom, top = mean.mean(0), high.min(0), low.max(0)
        has = np.flatnonzero(np.isfinite(middle))
        bars = np.maximum([middle[has] - bottom[has], top[has] - middle[has]], 0)
        aside = 0.16 * (i - (len(_kinds(names)) - 1) / 2)
        axes.errorbar(
            has + aside, middle[has], yerr=bars, label=kind, capsize=2, linewidth=1, **look(i)
        )
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(
        xlabel="layer (bars: 10 % and 90 % quantile, the widest of the rows above)",
        ylabel="1 - similarity",
    )
    plain(axes)
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98))
