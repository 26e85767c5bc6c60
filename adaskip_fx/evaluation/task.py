"""What a task is, and the options that all tasks have."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

from adaskip_fx.utils.files import JSON

from .examples import Example


class Task(Protocol):
    """Makes examples; a frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str:
        """The name on the command line."""
        ...

    @property
    def metric(self) -> str:
        """The name of its score."""
        ...

    def examples(self, tokenizer: Any) -> Sequence[Example]:
        """Return the examples, all of one kind; the same ones whenever the options are the same.

        Raises:
            ValueError: the options leave no example, or a file is not what it should be.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options that all tasks have.

    Attributes:
        samples: examples at most.
        length: tokens of a prompt at most.
        seed: seeds all that is drawn.
    """

    name: ClassVar[str]
    samples: int = 20
    length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("samples", "length"):
            value = getattr(self, option)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.name}: {option} must be at least 1, got {value!r}")

    def rng(self, number: int) -> random.Random:
        """Return a generator for example `number`, the same one whatever the other examples are."""
        return random.Random(f"{self.name}/{self.seed}/{number}")

    def depth(self, number: int) -> float:
        """Return how deep example `number` hides its answer: spread evenly over 0 to 1."""
        return (2 * number + 1) / (2 * self.samples)


@dataclass(frozen=True)
class FixedTask:
    """Examples that exist already, as a task.

    Attributes:
        name: the name in results.
        metric: the name of its score.
        given: the examples, all of one kind; they are no option and are not in reports.
    """

    name: str
    metric: str
    given: InitVar[Sequence[Example]]

    def __post_init__(self, given: Sequence[Example]) -> None:
        object.__setattr__(self, "_examples", tuple(given))

    def examples(self, tokenizer: Any) -> Sequence[Example]:
        """Return the examples; the tokenizer does not matter."""
        found: Sequence[Example] = self._examples  # type: ignore[attr-defined]
        return found


def required_file(path: Path | None, task: str, what: str) -> Path:
    """Return `path`.

    Raises:
        ValueError: it is None; says what the task reads.
    """
    if path is None:
        raise ValueError(f"the task {task} reads a file: give --data {task}=PATH, {what}")
    return path


def options_of(task: Task) -> dict[str, JSON]:
    """Return a task's options for a report; of files the names alone."""
    known = {f.name: getattr(task, f.name) for f in fields(task)}  # type: ignore[arg-type]
    return {n: v.name if isinstance(v, Path) else v for n, v in known.items()}


def files_of(task: Task) -> dict[str, JSON]:
    """Return the sha256 of every file that a task reads, by the file's name."""
    values = (getattr(task, f.name) for f in fields(task))  # type: ignore[arg-type]
    paths = [v for v in values if isinstance(v, Path)]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
