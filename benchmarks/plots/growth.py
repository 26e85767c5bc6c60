"""How the error grows with the number of sublayers skipped, against the sum of single errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .source import Document, items, place
from .style import look, plain

HOW = (
    "a growth picture is drawn from 'rows' with compensation, skipped, error, error_sum, kl and "
    "kl_sum, as `python -m benchmarks run study_errors` writes them"
)
_PANELS = (
    ("error", "relative error of the final stream"),
    ("kl", "KL to the full model, nats a token"),
)

_NAMES = {"none": "no compensation"}
_SUM = {"linestyle": "none", "fillstyle": "none", "markersize": 5}
_ROOT = {"linestyle": (0, (1, 3)), "linewidth": 1}


def figure(documents: Sequence[Document], make: Any) -> Any:
    """One panel for the stream, one for KL. PlotError for other data.

    Lines are measured, hollow markers are the sum of single errors, and thin dots the root of the
    sum of squares, where rows say it (``error_root``).
    """
    needs = ("compensation", "skipped", *(k for key, _ in _PANELS for k in (key, f"{key}_sum")))
    rows = items(documents, "rows", needs, HOW)
    kinds = {kind: look(i) for i, kind in enumerate(dict.fromkeys(r["compensation"] for r in rows))}
    drawn = make(figsize=(12, 4.4), layout="constrained")
    for axes, (key, label) in zip(drawn.subplots(1, 2), _PANELS, strict=True):
        for kind, looks in kinds.items():
            mine = sorted((r for r in rows if r["compensation"] == kind), key=_skipped)
            _draw(axes, kind, mine, key, looks)
        axes.set(xlabel="sublayers skipped", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain(axes)
    drawn.legend(
        handles=_legend(kinds), loc="outside right center", frameon=False, handlelength=3.5
    )
    drawn.suptitle(place(documents) or None, fontsize=10)
    return drawn


def _draw(axes: Any, kind: str, rows: Sequence[Document], key: str, looks: dict[str, Any]) -> None:
    at = [_skipped(r) for r in rows]
    axes.plot(at, [r[key] for r in rows], label=f"{kind}: measured", markersize=5, **looks)
    sums = {**_SUM, "marker": looks["marker"], "color": looks["color"]}
    axes.plot(at, [r[f"{key}_sum"] for r in rows], label=f"{kind}: sum of single errors", **sums)
    if all(f"{key}_root" in r for r in rows):
        roots = [r[f"{key}_root"] for r in rows]
        label = f"{kind}: root of the sum of squares"
        axes.plot(at, roots, label=label, **_ROOT, color=looks["color"])


def _legend(kinds: dict[str, dict[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D

    grey = "#444444"
    entries: list[tuple[str, dict[str, Any]]] = [
        *((_NAMES.get(kind, kind), {**looks, "markersize": 5}) for kind, looks in kinds.items()),
        ("sum of single errors", {**_SUM, "marker": "o", "color": grey}),
        ("root of the sum of squares", {**_ROOT, "color": grey}),
    ]
    return [Line2D([], [], label=label, **style) for label, style in entries]


def _skipped(row: Document) -> int:
    return int(row["skipped"])
