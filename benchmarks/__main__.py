"""``python -m benchmarks run NAME [NAME ...]`` measures, prints and writes ``results/NAME.json``.

``python -m benchmarks report`` prints what those files hold as Markdown tables, with pictures.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import report as reports

#: name -> the module that measures it; imported when it runs, since `report` needs no torch
WORKLOADS = {
    "link": "link",
    "speed": "speed",
    "speed_batch8": "speed",
    "plans": "plans",
    "window": "window",
    "generate": "generate",
    "peers": "peers",
    "peers_whole_graph": "peers",
    "cold": "cold",
    "budget": "budget",
}
RESULTS = Path(__file__).parent / "results"

app = typer.Typer(add_completion=False, help=__doc__)


@app.callback()
def main() -> None:
    """Measurements of adaskip_fx."""


@app.command()
def run(
    workloads: Annotated[list[str], typer.Argument(metavar="NAME", help=", ".join(WORKLOADS))],
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = RESULTS,
) -> None:
    """Measure workloads, one after another in this process, so that they share the model."""
    for name in workloads:
        if name not in WORKLOADS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(sorted(WORKLOADS))}")
    out.mkdir(parents=True, exist_ok=True)
    for name in workloads:
        module = importlib.import_module(f"benchmarks.{WORKLOADS[name]}")
        result = _document(name, module)
        text = json.dumps(result, indent=1)
        (out / f"{name}.json").write_text(text + "\n")
        typer.echo(f"{name}:\n{module.summary(result)}" if hasattr(module, "summary") else text)


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="folder with the JSON")] = RESULTS,
    out: Annotated[
        Path | None, typer.Option(help="folder for speed.svg and speed.png; that of the JSON")
    ] = None,
) -> None:
    """Print the results as Markdown tables, and draw them where matplotlib is installed."""
    try:
        documents = reports.load(results)
        typer.echo(reports.tables(documents))
    except reports.ReportError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    try:
        drawn = reports.draw(documents, out or results)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        typer.echo("plots left out: matplotlib is not installed", err=True)
    else:
        for path in drawn:
            typer.echo(f"wrote {path}", err=True)


def _document(name: str, module: Any) -> dict[str, Any]:
    """One workload's result with its conditions; a thread count it sets ends with it."""
    import torch

    from .conditions import conditions

    threads = torch.get_num_threads()
    try:
        return {"workload": name, **_measure(name, module), "conditions": conditions()}
    finally:
        torch.set_num_threads(threads)


def _measure(name: str, module: Any) -> dict[str, Any]:
    result: dict[str, Any]
    if name == "speed_batch8":
        on_gpu = module.models.device().type == "cuda"
        result = module.measure(batch=8, contexts=(8192,) if on_gpu else None)
    elif name == "peers_whole_graph":
        result = module.measure(whole_graph=True)
    else:
        result = module.measure()
    return result


if __name__ == "__main__":
    app()
