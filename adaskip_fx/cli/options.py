"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DtypeName = Literal["float32", "bfloat16", "float16"]

MODEL = "A folder, a .gguf file, or a name on the Hugging Face hub."
Model = Annotated[str, typer.Argument(help=MODEL)]
ProfileFolder = Annotated[Path, typer.Argument(help="Folder that calibrate wrote.")]
OptionalProfile = Annotated[
    Path | None,
    typer.Argument(help="Folder that calibrate wrote; without it and --plan nothing is skipped."),
]
Alpha = Annotated[
    float,
    typer.Option(min=1, help="Acceleration ratio: of S sublayers, about S (1 - 1/alpha) go."),
]
TimedContext = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        metavar="TOKENS",
        help="At which alpha is predicted time: how many times as fast prompts and steps are.",
    ),
]
TableFile = Annotated[
    Path | None,
    typer.Option(
        "--table",
        help="File that measure wrote, for --context; without it times are counted from bytes "
        "and operations.",
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="File that fit wrote, instead of a choice by alpha."),
]
Backend = Annotated[str, typer.Option(help="Inner torch.compile backend that compiles the pieces.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu or cuda.")]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(
        help="What the parameters are loaded as.", show_default="float32 on CPU, bfloat16 on CUDA"
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, instead of text.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what is compiled.")]
