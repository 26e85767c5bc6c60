"""From names, paths and values, as a command line gives them, to tasks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from .task import Task
from .tasks import TASKS

Files: TypeAlias = dict[str, list[Path]]


def tasks_of(
    names: Sequence[str],
    data: Sequence[str],
    changes: Sequence[str],
    options: Mapping[str, Any],
) -> list[Task]:
    """Make the tasks of these names; one that has several files comes up once for each.

    Args:
        names: of :data:`adaskip_fx.evaluation.tasks.TASKS`.
        data: ``TASK=PATH`` or ``TASK.OPTION=PATH``.
        changes: ``TASK.OPTION=VALUE``, the value as JSON.
        options: of all tasks.

    Raises:
        ValueError: an unknown task, option or value, or one for a task that is not asked for.
        FileNotFoundError: a file that is not there.
    """
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    files: dict[str, Files] = {name: {} for name in names}
    changed: dict[str, dict[str, Any]] = {name: {} for name in names}
    for item in data:
        name, option, text = _parsed(f"--data {item}", item, "TASK=PATH", names, paths=True)
        files[name].setdefault(option, []).append(_file(text))
    for item in changes:
        source = f"--set {item}"
        name, option, text = _parsed(source, item, "TASK.OPTION=VALUE", names, paths=False)
        changed[name][option] = _value(source, text)
    return [
        task for name in files for task in _made(name, files[name], {**options, **changed[name]})
    ]


def _parsed(
    source: str, item: str, form: str, names: Sequence[str], paths: bool
) -> tuple[str, str, str]:
    """Return the task, its option, and the text after it."""
    target, equals, text = item.partition("=")
    name, _, option = target.partition(".")
    option = option or ("path" if paths else "")
    if not equals or not text or not option or name not in TASKS:
        raise ValueError(f"{source}: not {form} with a TASK of {', '.join(TASKS)}")
    fields = dataclasses.fields(TASKS[name])
    known = [f.name for f in fields if ("Path" in str(f.type)) == paths]
    if option not in known:
        what = "file" if paths else "option"
        raise ValueError(f"{source}: {name} has no {what} {option!r}; it has {_listed(known)}")
    if name not in names:
        raise ValueError(f"{source}: the task {name} is not asked for; add --task {name}")
    return name, option, text


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _value(source: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source}: not JSON; write a text in double quotes") from error
    return tuple(value) if isinstance(value, list) else value


def _made(name: str, files: Files, options: Mapping[str, Any]) -> list[Task]:
    chosen: dict[str, Any] = {option: paths[-1] for option, paths in files.items()}
    paths = files.get("path", [])
    each = [{**options, **chosen, "path": path} for path in paths] or [{**options, **chosen}]
    made: list[Any] = [TASKS[name](**fields) for fields in each]
    return made
