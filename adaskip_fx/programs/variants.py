"""Linked programs by key, kept as far as the memory budget goes, and what was counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

from ..utils.memory_budget import MemoryBudget
from .program import Program

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """What a compiled model has done so far.

    Attributes:
        captures: Graphs traced with Dynamo.
        links: Programs linked for a plan.
        link_seconds: How long that took in all, pieces that were compiled meanwhile included.
        dropped: Programs that were let go, as there was no room in the memory budget.
        one_batch: Kinds of steps that need a graph for each number of rows (above one).
    """

    captures: int = 0
    links: int = 0
    link_seconds: float = 0.0
    dropped: int = 0
    one_batch: int = 0


class VariantCache:
    """Programs by key; of others only requests that run them hold them.

    Attributes:
        counters: What is counted.
    """

    def __init__(self, budget: MemoryBudget, counters: Counters) -> None:
        """Keep nothing yet.

        Args:
            budget: What is kept in all.
            counters: They count.
        """
        self.counters = counters
        self._budget = budget
        self._programs: dict[Hashable, Program] = {}

    def all(self) -> list[Program]:
        """Return the programs that are kept."""
        return list(self._programs.values())

    def find(self, key: Hashable) -> Program | None:
        """Return the program for `key`, which is about to run; None if it is not there."""
        program = self._programs.get(key)
        if program is not None:
            self.use(program)
        return program

    def use(self, program: Program) -> bool:
        """Say that a program is about to run; returns whether it is still kept."""
        self._budget.use(program.captured)
        return self._budget.use(program)

    def get(self, key: Hashable, make: Callable[[], Program]) -> Program:
        """Return the program for `key`, made if it is not there: by one caller at a time."""
        program = self.find(key)
        if program is None:
            program = make()
            logger.info(
                "linked %s with %d of %d sublayers in %.1f ms",
                program.captured.key.phase,
                len(program.runs),
                len(program.captured.sublayers),
                1000 * program.seconds,
            )
            self.counters.links += 1
            self.counters.link_seconds += program.seconds
            self._programs[key] = program
            self._budget.use(program.captured)
            self._budget.keep(program, "programs", partial(self._let_go, key))
        return program

    def _let_go(self, key: Hashable, program: Program) -> None:
        if self._programs.get(key) is program:
            del self._programs[key]
            self.counters.dropped += 1
