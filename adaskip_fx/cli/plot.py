"""``adaskip-fx plot``: register with :func:`register`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from ..plots import KINDS
from ..plots import plot as draw

_FILES = "Results of benchmarks, folders of profiles, or plan files; all go into one picture."


def register(app: typer.Typer, reported: Callable[[bool], AbstractContextManager[None]]) -> None:
    """Add the command to `app`.

    reported: from whether to debug to a context in which errors become one line.
    """

    @app.command()
    def plot(
        kind: Annotated[str, typer.Argument(help=", ".join(KINDS))],
        files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=_FILES)],
        out: Annotated[Path, typer.Option(help="Folder for the SVG and the PNG.")] = Path("."),
        name: Annotated[
            str | None, typer.Option(help="Name of the files.", show_default="the kind's")
        ] = None,
        debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")] = False,
    ) -> None:
        """Draw profiles, plans or results, as SVG and PNG."""
        with reported(debug):
            for path in draw(kind, files, out, name):
                typer.echo(f"wrote {path}")
