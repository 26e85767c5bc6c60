"""The picture of a report: decode steps of the peers, and what skipping brings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Document = dict[str, Any]

#: (marker, line, colour) of one series after another: each differs without its colour too
_STYLES = (
    ("o", "-", "#0b5fa5"),
    ("s", (0, (1, 1.2)), "#b8420f"),
    ("^", "-.", "#2e7d32"),
    ("D", (0, (6, 2)), "#6a3d9a"),
)
#: dashes of the promises, likewise
_DASHES = ((7, 2), (4, 1.5), (2, 1.5), (7, 2, 2, 2))
_PEERS = {
    "adaskip": "adaskip, nothing skipped",
    "eager": "transformers, eager",
    "static": "transformers, static cache,\nreduce-overhead",
    "whole graph": "adaskip, whole graph",
}


def draw(documents: dict[str, Document], folder: Path) -> list[Path]:
    """Write ``speed.svg`` and ``speed.png``, if speed or peers were measured; what was written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    speeds = [documents[name] for name in ("speed", "speed_batch8") if name in documents]
    peers = documents["peers"]["rows"] if "peers" in documents else []
    panels: list[Callable[[Any], None]] = []
    if peers:
        panels.append(functools.partial(_draw_peers, rows=peers))
    if speeds:
        panels += [
            functools.partial(_draw_speedup, phase=phase, speeds=speeds)
            for phase in ("decode", "prefill")
        ]
    if not panels:
        return []
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "adaskip_fx", "font.size": 9, "axes.titlesize": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.8 * len(panels), 4.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for one, panel in zip(axes, panels, strict=True):
            panel(one)
            one.grid(alpha=0.3, linewidth=0.6)
            one.spines[["top", "right"]].set_visible(False)
        shown = [*speeds, *(documents[name] for name in ("peers",) if peers)]
        devices = dict.fromkeys(document["conditions"]["device"] for document in shown)
        figure.suptitle(", ".join(devices), fontsize=10)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "speed.svg", folder / "speed.png"]
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=150)
    return paths


def _draw_peers(axes: Any, rows: Sequence[Document]) -> None:
    """Decode step time against context, a line for each peer."""
    names = list(dict.fromkeys(row["peer"] for row in rows))
    for name, (marker, line, colour) in zip(names, _STYLES, strict=False):
        points = sorted(
            (r["context"], 1000 * r["decode"]["median"]) for r in rows if r["peer"] == name
        )
        x, y = zip(*points, strict=True)
        label = _PEERS.get(name, name)
        axes.plot(x, y, marker=marker, linestyle=line, color=colour, label=label)
        for context, took in points:
            axes.annotate(
                f"{took:.1f}",
                (context, took),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
            )
    contexts = sorted({row["context"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.margins(x=0.2)
    times = [1000 * row["decode"]["median"] for row in rows]
    axes.set_yscale("log", base=2)
    axes.set_ylim(min(times) / 1.5, max(times) * 4)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title="Decode step, batch 1", xlabel="context, tokens", ylabel="ms a step")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_speedup(axes: Any, phase: str, speeds: Sequence[Document]) -> None:
    """Speed-up against sublayers skipped, measured and promised, for each batch and context."""
    series: list[tuple[int, int, list[Document]]] = [
        (document["batch"], context, [r for r in document["rows"] if r["context"] == context])
        for document in speeds
        for context in dict.fromkeys(row["context"] for row in document["rows"])
    ]
    for i, ((batch, context, rows), (marker, _, colour)) in enumerate(
        zip(series, _STYLES, strict=False)
    ):
        skipped = [row["skipped"] for row in rows]
        promise = [row.get(f"{phase}_promise", 1) for row in rows]
        measured = [row.get(f"{phase}_speedup", 1) for row in rows]
        look = {"marker": marker, "color": colour, "markersize": 8, "markeredgecolor": "white"}
        dashed = {"linestyle": (0, _DASHES[i]), "linewidth": 1.2}
        axes.plot(skipped, promise, color=colour, **dashed)
        aside = max(skipped) * 0.02 * (i - (len(series) - 1) / 2)  # where values are the same
        axes.plot([x + aside for x in skipped], measured, linestyle="none", zorder=3, **look)
        axes.plot([], [], label=f"batch {batch}, context {context:,}", **look, **dashed)
    count = 2 * speeds[0]["model"]["layers"]
    axes.set_xticks(sorted({row["skipped"] for _, _, rows in series for row in rows}))
    axes.set(
        title=f"{phase.capitalize()}: speed-up by skipping",
        xlabel=f"sublayers skipped of {count}",
        ylabel="speed-up over nothing skipped",
    )
    axes.legend(
        title="marker: measured; dashed: promise",
        frameon=False,
        fontsize=8,
        title_fontsize=8,
        alignment="left",
        loc="upper left",
        handlelength=3.5,
    )
