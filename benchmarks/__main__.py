"""``python -m benchmarks run WORKLOAD``: measure, print, and write ``results/WORKLOAD.json``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import link
from .conditions import conditions

#: name -> what measures it
WORKLOADS: dict[str, Callable[[], dict[str, Any]]] = {"link": link.measure}

app = typer.Typer(add_completion=False, help=__doc__)


@app.callback()
def main() -> None:
    """Measurements of adaskip_fx."""


@app.command()
def run(
    workload: str,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path(__file__).parent
    / "results",
) -> None:
    """Measure one workload."""
    if workload not in WORKLOADS:
        raise typer.BadParameter(f"{workload!r} is none of {', '.join(sorted(WORKLOADS))}")
    result = {"workload": workload, **WORKLOADS[workload](), "conditions": conditions()}
    text = json.dumps(result, indent=1)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{workload}.json").write_text(text + "\n")
    typer.echo(text)


if __name__ == "__main__":
    app()
