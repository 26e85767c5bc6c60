"""From names and paths, as a command line gives them, to tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from .task import Task
from .tasks import TASKS

Files: TypeAlias = dict[str, list[Path]]


def tasks_of(names: Sequence[str], data: Sequence[str], options: Mapping[str, Any]) -> list[Task]:
    """The tasks of these names; one that has several files comes up once for each.

    Args:
        names: of :data:`adaskip_fx.evaluation.tasks.TASKS`.
        data: ``TASK=PATH`` or ``TASK.OPTION=PATH``.
        options: of all tasks.

    Raises:
        ValueError: an unknown task or option, or a file for a task that is not asked for.
        FileNotFoundError: a file that is not there.
    """
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    files: dict[str, Files] = {name: {} for name in names}
    for item in data:
        name, option, path = _parsed(item)
        if name not in files:
            raise ValueError(f"--data {item}: the task {name} is not asked for; add --task {name}")
        files[name].setdefault(option, []).append(path)
    return [task for name in files for task in _made(name, files[name], options)]


def _parsed(item: str) -> tuple[str, str, Path]:
    """The task, its option, and the path."""
    target, equals, text = item.partition("=")
    name, _, option = target.partition(".")
    path, option = Path(text).expanduser(), option or "path"
    if not equals or not text or name not in TASKS:
        raise ValueError(f"--data {item}: not TASK=PATH with a TASK of {', '.join(TASKS)}")
    if option not in _paths(name):
        known = ", ".join(_paths(name)) or "none"
        raise ValueError(f"--data {item}: {name} has no file {option!r}; it has {known}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return name, option, path


def _paths(name: str) -> list[str]:
    """The options of a task that are paths."""
    return [f.name for f in dataclasses.fields(TASKS[name]) if "Path" in str(f.type)]


def _made(name: str, files: Files, options: Mapping[str, Any]) -> list[Task]:
    given: dict[str, Any] = {option: paths[-1] for option, paths in files.items()}
    paths = files.get("path", [])
    each = [{**options, **given, "path": path} for path in paths] or [{**options, **given}]
    made: list[Any] = [TASKS[name](**one) for one in each]
    return made
