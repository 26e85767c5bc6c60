"""``adaskip-fx windows``: from texts to a plan whose attention sees windows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .fit import Out, Samples, Seed, Texts, read_texts, text_files
from .options import AsJson, Backend, Debug, Device, Dtype, Model
from .reporting import print_json, reported

Phase = Literal["prefill", "decode"]


KeyShare = Annotated[
    float,
    typer.Option(
        min=1,
        help="How many times fewer keys and values a decode step reads; with --table, how many "
        "times as fast it is.",
    ),
]
Tokens = Annotated[int, typer.Option(min=1, help="Last tokens that a window shows.")]
Sinks = Annotated[int, typer.Option(min=0, help="First tokens that it shows too.")]
Layers = Annotated[
    bool, typer.Option("--layers/--heads", help="Choose whole layers, or K/V heads.")
]
Context = Annotated[
    int | None, typer.Option(help="Tokens stored, at which alpha counts.", show_default="all")
]
Table = Annotated[
    Path | None, typer.Option(help="File that measure --window wrote: alpha counts time.")
]
Faster = Annotated[Phase, typer.Option(help="For --table: what is to be faster.")]
Questions = Annotated[int, typer.Option(min=0, help="Questions to judge by as well.")]
MaxLength = Annotated[int, typer.Option(min=64, help="Tokens of a text at most.")]


def windows(
    model: Model,
    out: Out,
    text: Texts = None,
    alpha: KeyShare = 1.5,
    window: Tokens = 256,
    sinks: Sinks = 4,
    layers: Layers = False,
    context: Context = None,
    table: Table = None,
    phase: Faster = "decode",
    questions: Questions = 16,
    max_length: MaxLength = 4096,
    samples: Samples = 4,
    seed: Seed = 0,
    backend: Backend = "eager",
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Choose the heads or layers whose windows lose the least, and save the plan."""
    files = text_files(text)
    with reported(debug) as report:
        from ..fitting import WindowRecipe, choose_windows
        from ..latency.table import LatencyTable
        from ..plans.windows import Window
        from ..utils.files import check_file_target
        from .json_views import decision_json
        from .subject import loaded_model

        check_file_target(out, "a plan")  # before minutes of work
        recipe = WindowRecipe(
            per="layer" if layers else "head",
            max_length=max_length,
            questions=questions,
            context=context,
            table=LatencyTable.load(table) if table is not None else None,
            phase=phase,
            seed=seed,
        )
        texts = read_texts(files, max_length, samples)
        loaded = loaded_model(model, device, dtype, report)
        seen = Window(window, sinks)
        with report.step("windows"):
            plan = choose_windows(
                *(loaded.model, loaded.tokenizer, texts, alpha, seen, recipe),
                backend=backend,
                say=report.say,
            )
        plan.save(out)
        if as_json:
            print_json({"saved_to": str(out), **decision_json(plan)})
        else:
            typer.echo(str(plan))
        report.say(f"saved to {out}")
