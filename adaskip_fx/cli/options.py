"""Options that several commands have, their console, and how they report errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "A folder, a .gguf file, or a name on the Hugging Face hub."
Model = Annotated[str, typer.Argument(help=MODEL)]
Alpha = Annotated[
    float, typer.Option(help="Acceleration ratio: of S sublayers, about S (1 - 1/alpha) go.")
]
Backend = Annotated[str, typer.Option(help="Inner torch.compile backend that compiles the pieces.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu or cuda.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16.", show_default="float32 on CPU, bfloat16 on CUDA"
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def console(*, stderr: bool = False) -> Console:
    """For tables and progress: at most 100 columns, and as many where there is no terminal."""
    from rich.console import Console

    found = Console(stderr=stderr)
    if not found.is_terminal or found.width > 100:
        found = Console(stderr=stderr, width=100)
    return found


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Errors that a user can do something about: one line on stderr and exit code 1."""
    try:
        yield
    except Exception as error:
        if debug or not _expected(error):
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def _expected(error: Exception) -> bool:
    if isinstance(error, BrokenPipeError):  # the reader has enough; click ends quietly
        return False
    from adaskip_passes import UnsupportedError

    return isinstance(
        error, ValueError | TypeError | OSError | NotImplementedError | UnsupportedError
    )
