"""Linked programs by key, of which the least recently used are dropped, and what was counted."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from ..capture.phase_graph import CapturedPhase
from .program import Program

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """What a compiled model has done so far.

    Attributes:
        captures: Graphs traced with Dynamo.
        links: Programs linked for a plan.
        link_seconds: How long that took in all, pieces that were compiled meanwhile included.
        dropped: Programs forgotten because there were more than ``max_variants``.
        one_batch: Kinds of steps that need a graph for each number of rows (above one).
    """

    captures: int = 0
    links: int = 0
    link_seconds: float = 0.0
    dropped: int = 0
    one_batch: int = 0


class VariantCache:
    """Programs by key, of which the least recently used are dropped.

    Attributes:
        limit: How many are kept.
        counters: What is counted.
    """

    def __init__(
        self, limit: int, counters: Counters, lost: Callable[[CapturedPhase], None]
    ) -> None:
        """Keep nothing yet.

        Args:
            limit: How many to keep.
            counters: They count.
            lost: Is told the captured graph of a program that was dropped.
        """
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_variants must be at least 1, got {limit!r}")
        self.limit = limit
        self.counters = counters
        self._lost = lost
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()
        self._lock = threading.Lock()  # of the order, for moments

    def __len__(self) -> int:
        return len(self._programs)

    def captured(self) -> set[CapturedPhase]:
        """Return the captured graphs of the programs that are kept."""
        with self._lock:
            return {program.captured for program in self._programs.values()}

    def find(self, key: Hashable) -> Program | None:
        """Return the program for `key`; None if it is not there."""
        with self._lock:
            program = self._programs.get(key)
            if program is not None:
                self._programs.move_to_end(key)
            return program

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
            with self._lock:
                self._programs[key] = program
                while len(self._programs) > self.limit:
                    _, dropped = self._programs.popitem(last=False)
                    self._lost(dropped.captured)
                    self.counters.dropped += 1
        return program
