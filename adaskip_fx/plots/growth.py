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


def figure(documents: Sequence[Document], make: Any) -> Any:
    """One panel for the stream, one for KL; hollow markers are the sum. PlotError for other data.

    Rows may also say ``error_root``, the root of the sum of squares.
    """
    needs = ("compensation", "skipped", *(k for key, _ in _PANELS for k in (key, f"{key}_sum")))
    rows = items(documents, "rows", needs, HOW)
    drawn = make(figsize=(10.5, 4.4), layout="constrained")
    for axes, (key, label) in zip(drawn.subplots(1, 2), _PANELS, strict=True):
        for i, kind in enumerate(dict.fromkeys(row["compensation"] for row in rows)):
            mine = sorted((r for r in rows if r["compensation"] == kind), key=_skipped)
            at, looks = [_skipped(r) for r in mine], look(i)
            axes.plot(at, [r[key] for r in mine], label=f"{kind}: measured", markersize=5, **looks)
            faint = {**looks, "marker": looks["marker"], "linestyle": "none", "fillstyle": "none"}
            label_sum = f"{kind}: sum of single errors"
            sums = [r[f"{key}_sum"] for r in mine]
            axes.plot(at, sums, label=label_sum, markersize=5, alpha=0.8, **faint)
            if all(f"{key}_root" in r for r in mine):
                roots = [r[f"{key}_root"] for r in mine]
                root = {"color": looks["color"], "linestyle": (0, (1, 3)), "linewidth": 1}
                axes.plot(at, roots, label=f"{kind}: root of the sum of squares", **root)
        axes.set(xlabel="sublayers skipped", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain(axes)
    drawn.axes[0].legend(frameon=False, handlelength=3.5)
    drawn.suptitle(place(documents) or None, fontsize=10)
    return drawn


def _skipped(row: Document) -> int:
    return int(row["skipped"])
