"""The results as Markdown tables and as a picture; needs neither torch nor transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: the results that a report is made of
NAMES = (
    "speed",
    "speed_batch8",
    "peers",
    "peers_whole_graph",
    "generate",
    "plans",
    "window",
    "cold",
    "budget",
)
SPEED_HEAD = (
    *("context", "skipped"),
    *("prefill s", "over floor", "speed-up", "promise", "kept"),
    *("decode ms", "over floor", "speed-up", "promise", "kept"),
    *("K/V GiB", "share"),
)
BUDGET_HEAD = ("phase", "context", "plan", "attention", "ffn", "predicted", "measured", "error")
PEERS_HEAD = ("context", "peer", "prefill s", "decode ms", "decode against adaskip")

Document = dict[str, Any]


class ReportError(Exception):
    """There is nothing to report, or a file is not a result."""


def load(folder: Path) -> dict[str, Document]:
    """The results in `folder`, by name; those that were not measured are left out.

    Raises:
        ReportError: a file cannot be read, or there is none.
    """
    documents = {}
    for name in NAMES:
        path = folder / f"{name}.json"
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ReportError(f"{path} cannot be read: {error}") from None
        if not isinstance(document, dict) or document.get("workload") != name:
            raise ReportError(f"{path} is not a result of `python -m benchmarks run {name}`")
        documents[name] = document
    if not documents:
        raise ReportError(
            f"no results in {folder}: `python -m benchmarks run {NAMES[0]}` writes some"
        )
    return documents


def tables(documents: dict[str, Document]) -> str:
    """All tables.

    Raises:
        ReportError: a result lacks what its table shows.
    """
    parts = []
    figures: dict[str, list[tuple[str, str]]] = {}  # by conditions
    for name, document in documents.items():
        try:
            where = _where(document)
            if name in ("speed", "speed_batch8"):
                parts.append(_speed(document, where))
            elif name == "budget":
                parts.append(_budget(document, where))
            elif name in ("peers", "peers_whole_graph"):
                rows = _peer_rows(document["rows"])
                title = "Peers" if name == "peers" else "Peers, in another run"
                parts.append(f"## {title}\n\n{where}\n\n{_table(PEERS_HEAD, rows, left=(1,))}")
            else:
                figures.setdefault(where, []).extend(_FIGURES[name](document))
        except (KeyError, TypeError) as error:
            raise ReportError(f"{name}.json is not complete: {error!r}") from None
    for where, pairs in figures.items():
        table = _table(("figure", "value"), pairs, left=(0,))
        parts.append(f"## Single figures\n\n{where}\n\n{table}")
    return "\n\n".join(parts)


def _where(document: Document) -> str:
    at = document["conditions"]
    return (
        f"{at['device']}, {at['threads']} threads on {at['cores']} cores, Python {at['python']}, "
        f"torch {at['torch']}, transformers {at['transformers']}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """A Markdown table that also reads as plain text; columns not in `left` align right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * (width + 2) if i in left else "-" * (width + 1) + ":"
        for i, width in enumerate(widths)
    )
    return "\n".join([line(head), f"|{'|'.join(rule)}|", *map(line, rows)])


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _speed(document: Document, where: str) -> str:
    model, top = document["model"], document["ceilings"]
    rows = []
    for row in document["rows"]:
        cells = [str(row["context"]), str(row["skipped"])]
        for phase, scale, digits in (("prefill", 1, 4), ("decode", 1000, 3)):
            cells += [
                _number(scale * row[phase]["median"], digits),
                _number(row[f"{phase}_over_floor"]),
                *(_number(row.get(f"{phase}_{k}")) for k in ("speedup", "promise")),
                _number(row.get(f"{phase}_kept_of_promise")),
            ]
        rows.append([*cells, _number(row["kv_bytes"] / 2**30), _number(row["kv_share"])])
    return (
        f"## Speed, batch {document['batch']}\n\n{where}; {model['layers']} layers, "
        f"hidden size {model['hidden']}, {document['dtype']}; measured ceilings "
        f"{top['copy_bytes_per_s'] / 1e9:.4g} GB/s and "
        f"{top['matrix_flop_per_s'] / 1e12:.4g} TFLOP/s\n\n{_table(SPEED_HEAD, rows)}"
    )


def _budget(document: Document, where: str) -> str:
    model = document["model"]
    rows = [
        [
            *(row["phase"], str(row["context"]), row["plan"]),
            *(str(row["attention"]), str(row["ffn"])),
            *(_number(row["predicted"]), _number(row["measured"]), f"{row['error']:+.1%}"),
        ]
        for row in document["rows"]
    ]
    return (
        f"## Speed-up, predicted and measured\n\n{where}; {model['layers']} layers, "
        f"hidden size {model['hidden']}, {document['dtype']}; the prediction is off by at most "
        f"{document['worst']:.1%}\n\n{_table(BUDGET_HEAD, rows, left=(0, 2))}"
    )


def _peer_rows(rows: Sequence[Document]) -> list[list[str]]:
    ours = {r["context"]: r["decode"]["median"] for r in rows if r["peer"] == "adaskip"}
    cells = []
    for row in rows:
        decode, own = row["decode"]["median"], ours.get(row["context"])
        prefill = row["prefill"]["median"] if "prefill" in row else None
        ratio = "-" if own is None else f"{decode / own:.2f}"
        cells.append(
            [
                str(row["context"]),
                row["peer"],
                _number(prefill, 4),
                _number(1000 * decode),
                ratio,
            ]
        )
    return cells


def _generate(document: Document) -> list[tuple[str, str]]:
    return [
        (
            f"generate, {kind}: share of the step rate (context {document['context']})",
            _number(document[kind]["of_step_rate"]),
        )
        for kind in ("greedy", "sampling")
    ]


def _plans(document: Document) -> list[tuple[str, str]]:
    step, new = document["step_ms"]["median"], document["step_with_new_plan_ms"]
    return [
        *(
            (
                f"pause for a new plan, {which} of {new['repeats']}, ms",
                _number(new[which] - step, 1),
            )
            for which in ("median", "max")
        ),
        ("memory per plan, MiB", _number(document["memory_per_plan_bytes"] / 2**20, 2)),
    ]


def _window(document: Document) -> list[tuple[str, str]]:
    return [
        (
            f"step with {document['probed']} probes over a step without",
            _number(document["probed_over_plain"]),
        ),
        (
            f"calibration over plain prompts (16 of {document['prompt']} tokens)",
            _number(document["calibration_over_prompts"]),
        ),
    ]


_CACHES = {"none": "no", "warm": "warm"}


def _cold(document: Document) -> list[tuple[str, str]]:
    return [
        (
            f"cold start, {row['layers']} layers, {_CACHES[row['cache']]} compile cache, s "
            f"(capture; to the first prompt; and two tokens)",
            "; ".join(_number(row[k], 1) for k in ("capture_s", "prompt_s", "total_s")),
        )
        for row in document["rows"]
    ]


_FIGURES = {"generate": _generate, "plans": _plans, "window": _window, "cold": _cold}

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
