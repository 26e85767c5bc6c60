"""What a task is, and the options that all tasks have."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

from adaskip_fx.utils.files import JSON

from .examples import Example


class Task(Protocol):
    """Makes examples; a frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        ...

    @property
    def metric(self) -> str:
        """What its score is."""
        ...

    def examples(self, tokenizer: Any) -> Sequence[Example]:
        """The examples, all of one kind; the same ones whenever the options are the same.

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
        seed: of all that is drawn.
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

    def chance(self, number: int) -> random.Random:
        """Random numbers for example `number`, the same ones whatever the other examples are."""
        return random.Random(f"{self.name}/{self.seed}/{number}")

    def depth(self, number: int) -> float:
        """How deep example `number` hides its answer: spread evenly over 0 to 1."""
        return (2 * number + 1) / (2 * self.samples)


def needed(path: Path | None, task: str, what: str) -> Path:
    """`path`, or ValueError that says what the task reads."""
    if path is None:
        raise ValueError(f"the task {task} reads a file: give --data {task}=PATH, {what}")
    return path


def options_of(task: Task) -> dict[str, JSON]:
    """A task's options for a report; of files the names alone."""
    known = {f.name: getattr(task, f.name) for f in fields(task)}  # type: ignore[arg-type]
    return {n: v.name if isinstance(v, Path) else v for n, v in known.items()}


def files_of(task: Task) -> dict[str, JSON]:
    """The sha256 of every file that a task reads, by the file's name."""
    values = (getattr(task, f.name) for f in fields(task))  # type: ignore[arg-type]
    paths = [v for v in values if isinstance(v, Path)]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
