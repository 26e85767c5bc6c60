"""``adaskip-fx measure``: what each sublayer costs on this device, as a table in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Backend, Debug, Device, Dtype, Model
from .reporting import print_json, reported


def measure(
    model: Model,
    out: Annotated[Path, typer.Argument(help="File to write the table to.")],
    context: Annotated[
        list[int], typer.Option(metavar="TOKENS", help="At which to measure; may be repeated.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often each plan is timed.")] = 5,
    ranks: Annotated[
        bool, typer.Option("--ranks", help="Measure low-rank surrogates too, for fit --within.")
    ] = False,
    window: Annotated[
        list[int] | None,
        typer.Option(metavar="TOKENS", min=1, help="Measure attention with this window too."),
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that windows see too.")] = 4,
    backend: Backend = "inductor",
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure what each sublayer costs on this device, for budgets of time, and save the table."""
    with reported(debug) as steps:
        from ..measurement.measure import measure as measure_table
        from ..plans.windows import Window
        from ..utils.files import check_file_target
        from .subject import compiled_model

        check_file_target(out, "a table")  # before minutes of work
        _, compiled = compiled_model(model, device, dtype, backend, steps)
        with steps.step("measure") as advance:
            table = measure_table(
                compiled,
                context,
                batch=batch,
                rounds=rounds,
                ranks=ranks,
                windows=[Window(tokens, sinks) for tokens in window or ()],
                progress=advance,
            )
        table.save(out)
        if as_json:
            print_json(
                {
                    "kind": "latency table",
                    "saved_to": str(out),
                    **json.loads(out.read_text("utf-8")),
                }
            )
        else:
            typer.echo(str(table))
        if table.warning:
            steps.say(table.warning)
        steps.say(f"saved to {out}")
