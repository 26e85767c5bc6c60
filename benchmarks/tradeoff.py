"""``python -m benchmarks tradeoff``: quality against measured speed, of skipping and of windows.

Speeds are those of an 8B shape with random weights (`run speed windows`), quality is that of a real
model (`run study_pareto study_windows`). A speed goes with the plan of its kind that leaves out the
least of those that leave out at least as much, so that quality is never flattered: a share of the
sublayers, or of the keys and values that a step reads at its context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .plots import PlotError, plot
from .plots.pareto import PHASES, front
from .report import ReportError
from .tables import table

Document = dict[str, Any]
NEEDED = ("speed", "windows", "study_pareto", "study_windows")
_NEAR = 0.01  # of a context: measured ones may be so far from it
_SINKS = 4  # of the windows of `run windows`
_SKIPPED = "AdaSkip"
#: plan of `run windows` -> its kind, and how the ways of study_windows begin that are of this kind
_WINDOWS = {
    "half of the layers": ("windows, whole layers", "layers"),
    "half of the heads": ("windows, K/V heads", "heads"),
}
_RESULTS = Path(__file__).parent / "results"


def command(
    results: Annotated[Path, typer.Option(help="folder with the JSON")] = _RESULTS,
    out: Annotated[
        Path | None, typer.Option(help="folder for tradeoff.json and its picture; the same")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="tokens at which speed counts")] = 32768,
    text: Annotated[str, typer.Option(help="text on which quality was read")] = "pg19",
) -> None:
    """Print and draw quality against measured speed: skipping, and windows."""
    folder = out or results
    try:
        result = tradeoff(load(results), context, text)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "tradeoff.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        typer.echo(summary(result))
        for path in plot("pareto", [file], folder, "tradeoff"):
            typer.echo(f"wrote {path}", err=True)
    except (ReportError, PlotError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def load(folder: Path) -> dict[str, Document]:
    """Return the results that are joined, by name.

    Raises:
        ReportError: One is missing or is no result; says what writes it.
    """
    documents = {}
    for name in NEEDED:
        path = folder / f"{name}.json"
        try:
            documents[name] = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise ReportError(
                f"{path} is missing: `python -m benchmarks run {name}` writes it; all of "
                f"{', '.join(NEEDED)} are needed"
            ) from None
        except (OSError, ValueError) as error:
            raise ReportError(f"{path} cannot be read: {error}") from None
    return documents


def tradeoff(documents: Mapping[str, Document], context: int, text: str) -> Document:
    """Return the points of a Pareto picture, of all plans whose speed was measured at a context.

    Args:
        documents: By name; see `NEEDED`.
        context: In tokens.
        text: Name of the text that quality was read on.

    Raises:
        ReportError: Results were measured on several devices, at other contexts, on other texts or
            with other models, or lack something.
    """
    try:
        device = _one(documents, ("speed", "windows"), "device", "conditions")
        model = _one(documents, ("study_pareto", "study_windows"), "name", "model")
        points = [*_skipped(documents, context, text), *_windowed(documents, context, text)]
    except (KeyError, TypeError) as error:
        raise ReportError(f"a result is not complete: {error!r}; measure it again") from None
    if not points:
        raise ReportError("no plan whose quality is known leaves out as much as one that was timed")
    for phase in PHASES:
        values = [(p["speedup"][phase], p["quality"][phase]) for p in points]
        best = front(values, lower_is_better=True)
        for number, point in enumerate(points):
            point.setdefault("front", {})[phase] = number in best
    return {
        "workload": "tradeoff",
        "context": context,
        "text": text,
        "model": {"name": f"quality: {model}; speed: 8B shape at {context:,} tokens"},
        "conditions": {"device": device},
        "quality_name": f"perplexity ratio on {text}",
        "points": points,
    }


def _one(documents: Mapping[str, Document], names: Sequence[str], key: str, under: str) -> str:
    """Return what the results say alike."""
    said = {name: str(documents[name][under][key]) for name in names}
    if len({*said.values()}) > 1:
        each = ", ".join(f"{name}: {value}" for name, value in said.items())
        raise ReportError(f"results differ in their {under}'s {key} ({each}); measure them alike")
    return said[names[0]]


def _rows(document: Document, name: str, context: int) -> list[Document]:
    """Return the rows of the context that is near enough."""
    found = [r for r in document["rows"] if abs(r["context"] - context) <= _NEAR * context]
    if not found:
        known = ", ".join(str(c) for c in dict.fromkeys(r["context"] for r in document["rows"]))
        raise ReportError(f"{name}.json has no row at {context} tokens: give --context, of {known}")
    return found


def _skipped(documents: Mapping[str, Document], context: int, text: str) -> Iterator[Document]:
    speed, pareto = documents["speed"], documents["study_pareto"]
    if pareto["evaluated_on"] != text:
        raise ReportError(
            f"study_pareto.json was read on {pareto['evaluated_on']!r}, not {text!r}: give --text, "
            f"or run study_pareto with this text as the last"
        )
    total, judged = 2 * speed["model"]["layers"], pareto["model"]["sublayers"]
    plans = [p for p in pareto["points"] if p["policy"] == _SKIPPED and p["published"]]
    for row in _rows(speed, "speed", context):
        plan = _least(plans, row["skipped"] / total, lambda p: p["skipped"] / judged)
        if row["skipped"] and plan is not None:
            yield {
                **_point(_SKIPPED, row, plan["quality"]),
                "skipped": row["skipped"],
                "left_out": f"{row['skipped']} of {total} sublayers",
                "judged": f"{plan['skipped']} of {judged}",
            }


def _windowed(documents: Mapping[str, Document], context: int, text: str) -> Iterator[Document]:
    timed, judged = documents["windows"], documents["study_windows"]
    rows, full = judged["rows"], judged["full"]["tasks"]
    if not all(text in row["texts"] for row in rows):
        raise ReportError(
            f"study_windows.json has no text {text!r}: run it with --text {text}=FILE"
        )
    for row in _rows(timed, "windows", context):
        if row["plan"] not in _WINDOWS:
            continue
        kind, begins = _WINDOWS[row["plan"]]
        share = (1 - (timed["window"] + _SINKS) / row["context"]) / 2
        plans = [r for r in rows if r["way"].startswith(begins)]
        plan = _least(plans, share, lambda r: r["share"])
        if plan is not None:
            cost = plan["texts"][text]
            yield {
                **_point(kind, row, dict.fromkeys(PHASES, cost["perplexity_ratio"])),
                "skipped": f"{share:.0%}",
                "left_out": f"{share:.0%} of K/V reads",
                "judged": f"{plan['share']:.0%}, {plan['way']}",
                "kl": cost["kl"],
                "passkeys": plan["tasks"]["passkey"]["mean"] / full["passkey"]["mean"],
            }


def _least(plans: Sequence[Document], share: float, of: Any) -> Document | None:
    """Return the plan that leaves out the least of those that leave out at least a share."""
    return min((p for p in plans if of(p) >= share), key=of, default=None)


def _point(policy: str, row: Document, quality: Mapping[str, float]) -> Document:
    speedup = {phase: row.get(f"{phase}_speedup", 1.0) for phase in PHASES}
    return {"policy": policy, "speedup": speedup, "quality": {p: quality[p] for p in PHASES}}


def summary(result: Document) -> str:
    """Return a table of all points; a star marks those that none beats in both, in a phase."""
    head = ["plan", "left out", "prefill", "decode", "its perplexity", "KL", "passkeys"]
    cells = []
    for point in result["points"]:
        line = [point["policy"], point["left_out"]]
        for phase in PHASES:
            star = "*" if point["front"][phase] else ""
            line.append(f"{point['speedup'][phase]:.2f}x{star}")
        ratios = dict.fromkeys(f"{point['quality'][phase]:.3f}x" for phase in PHASES)
        line.append(f"{', '.join(ratios)} ({point['judged']})")
        line += [
            f"{point[k]:.{n}f}" if k in point else "-" for k, n in (("kl", 4), ("passkeys", 3))
        ]
        cells.append(line)
    return (
        f"{result['model']['name']}, {result['conditions']['device']}; quality on "
        f"{result['text']}, of the plan in brackets; passkeys of those that the full model finds\n"
        + table(head, cells, left=(0, 1))
    )
