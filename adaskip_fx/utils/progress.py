"""What a long command is doing, for the person who waits: a bar on a terminal, else lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Advance = Callable[[int, int], None]


class Steps:
    """Shows steps one after the other and remembers how long each took.

    Attributes:
        seconds: of the finished steps, by title.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str) -> Iterator[Advance]:
        """One step; the function given to the block is called with (done, total)."""
        start = time.perf_counter()
        if self.console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(title, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        else:
            self.console.print(f"{title} ...", highlight=False, markup=False)
            yield self._line
        self.seconds[title] = time.perf_counter() - start
        self.say(f"{title}: {self.seconds[title]:.1f} s")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False)

    def _line(self, done: int, total: int) -> None:
        if done:
            self.say(f"  {done} of {total}")

    def _bar(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        return Progress(*columns, console=self.console, transient=True)
