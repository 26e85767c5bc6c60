"""What commands print: results on stdout; progress, messages and errors on stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..utils.progress import Steps

_LOGGER = logging.getLogger("adaskip_fx")
#: What is captured, compiled and linked is told with --debug alone (and by TORCH_LOGS).
_DETAILS = ("adaskip_fx.passes", "adaskip_fx.programs")


def console(*, stderr: bool = False) -> Console:
    """Return a console of at most 100 columns, and of as many where there is no terminal."""
    from rich.console import Console

    found = Console(stderr=stderr)
    if not found.is_terminal or found.width > 100:
        found = Console(stderr=stderr, width=100)
    return found


def plain_table(*titles: str) -> Table:
    """Return a table without rules or colours, whose cells are not wrapped."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="none")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def print_json(result: Mapping[str, Any]) -> None:
    """Print a result as one JSON object on stdout."""
    typer.echo(json.dumps(result, indent=1))


@contextmanager
def reported(debug: bool) -> Iterator[Steps]:
    """Show what is going on and report errors that a user can do something about.

    Inside of the block, messages that the package logs appear on stderr beside the progress. Such
    an error becomes one line on stderr and exit code 1; any other one is raised as it is.

    Args:
        debug: raise every error as it is, so that its traceback is seen; show each graph that is
            captured and each program that is linked.

    Yields:
        Shows steps and their progress on stderr.
    """
    from ..utils.progress import LogLines, Steps

    steps = Steps(console(stderr=True))
    handler, level = LogLines(steps.console), _LOGGER.level
    handler.addFilter(
        lambda record: (
            debug or record.levelno >= logging.WARNING or not record.name.startswith(_DETAILS)
        )
    )
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    try:
        yield steps
    except Exception as error:
        if debug or not _expected(error):
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)


def _expected(error: Exception) -> bool:
    if isinstance(error, BrokenPipeError):  # the reader has enough; click ends quietly
        return False
    from adaskip_passes.errors import AdaskipError

    return isinstance(error, ValueError | TypeError | OSError | NotImplementedError | AdaskipError)
