"""What a long command is doing, for the person who waits: bars on a terminal, else plain lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int, int], None]


class Steps:
    """Shows steps one after the other and remembers how long each took.

    On a terminal a step is a bar with the time that has passed and the time that remains. Where
    there is none, nothing is drawn: a line says when a step begins and one how long it took.

    Attributes:
        console: where it is shown.
        seconds: how long each finished step took, by title.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str) -> Iterator[Advance]:
        """Show one step while the block runs.

        Args:
            title: what is being done.

        Yields:
            A function to call with (done, total).
        """
        start = time.perf_counter()
        if self.console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(title, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        else:
            self.say(f"{title} ...")
            yield lambda done, total: None
        self.seconds[title] = time.perf_counter() - start
        self.say(f"{title}: {self.seconds[title]:.1f} s")

    def say(self, text: str) -> None:
        """Print a line that stays, above the bar if one is shown."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _bar(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=self.console, transient=True)


class LogLines(logging.Handler):
    """Prints what is logged as plain lines on a console, above a bar if one is shown."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of one record."""
        self._console.print(record.getMessage(), highlight=False, markup=False, soft_wrap=True)
