"""Decisions of several plans as folders: a document, and the files of each plan that it names."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from adaskip_fx.plans.decisions import Decision, PlanChooser, PlanSet, Schedule
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan
from adaskip_fx.utils.files import JSON, check_digest, read_document, write_atomically

SCHEMA = 1
DOCUMENT = "decision.json"
_KEYS = ("digest", "kind", "entries")
_OURS = re.compile(r"plan-[0-9a-f]{16}\.json|compensation-[0-9a-f]{16}\.safetensors")
_PLAN_FILE = re.compile(r"plan-[0-9a-f]{16}\.json")
_REDO = "make the decision again and save it"


def save_decision(decision: Decision, path: str | Path) -> None:
    """Write a plan's file, or the folder of any other decision: a document and a file per plan.

    A crash at any point leaves what was there, or the new decision, whole.

    Raises:
        PlanError: `path` must be a folder and is a file, or holds something else; or this kind of
            decision cannot be saved.
    """
    folder = Path(path)
    if isinstance(decision, SkipPlan):
        decision.save(folder)
        return
    beside = zip(decision.to_entries(), decision.plans, strict=True)
    _check_target(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {plan.digest: f"plan-{plan.digest}.json" for plan in decision.plans}
    for plan in decision.plans:
        plan.save(folder / names[plan.digest])
    document: dict[str, JSON] = {
        "schema": SCHEMA,
        "digest": decision.digest,
        "kind": decision.kind,
        "entries": [{**more, "plan": plan.digest} for more, plan in beside],
    }
    write_atomically(folder / DOCUMENT, json.dumps(document, indent=1).encode())
    named = {*names.values(), *(str(plan.to_json()["tensors"]) for plan in decision.plans)}
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)


#: The kinds of folders that can be loaded.
_KINDS: dict[str, type[Schedule | PlanChooser]] = {Schedule.kind: Schedule}
#: The modules that register kinds of their own; they are imported where a folder needs them.
_HOMES = {"choice": "adaskip_fx.contrib.routing"}
#: What was saved by a version that had these kinds.
_GONE = {"plan per stage": "load the plan of each stage, plan-*.json in the folder, by itself"}


def register_kind(kind: type[PlanChooser]) -> None:
    """Have `load_decision` read folders of another kind.

    Args:
        kind: A class with a `kind` of its own that can be made from entries.

    Raises:
        ValueError: It has no `kind` of its own.
    """
    if kind.kind == PlanSet.kind or _KINDS.get(kind.kind, kind).__name__ != kind.__name__:
        raise ValueError(f"{kind.__name__} needs a kind of its own, and says {kind.kind!r}")
    _KINDS[kind.kind] = kind


def load_decision(path: str | Path) -> Decision:
    """Read a plan's file, or the folder of a decision of several plans.

    Raises:
        PlanError: It says which file, what is wrong with it and what to do.
    """
    path = Path(path)
    return _load(path) if path.is_dir() else SkipPlan.load(path)


def _load(folder: Path) -> Decision:
    path = folder / DOCUMENT
    data = read_document(path, SCHEMA, _KEYS, PlanError, _REDO)
    if data["kind"] not in _KINDS and data["kind"] in _HOMES:
        importlib.import_module(_HOMES[data["kind"]])
    if data["kind"] not in _KINDS:
        todo = _GONE.get(data["kind"], _REDO)
        raise PlanError(f"{path}: unknown kind {data['kind']!r}; {todo}")
    try:
        decision = _KINDS[data["kind"]].from_entries(
            [(_plan(folder, entry), entry) for entry in data["entries"]]
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise PlanError(f"{path}: not a valid {data['kind']} ({error!r}); {_REDO}") from error
    check_digest(path, data["digest"], decision.digest, PlanError, _REDO)
    return decision


def _plan(folder: Path, entry: dict[str, Any]) -> SkipPlan:
    name = f"plan-{entry['plan']}.json"
    if not _PLAN_FILE.fullmatch(name):
        raise KeyError(entry["plan"])
    return SkipPlan.load(folder / name)


def _check_target(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise PlanError(f"{folder}: is a file, but this decision is a folder; choose another path")
    foreign = [p.name for p in folder.iterdir() if not _ours(p.name)]
    if foreign and not (folder / DOCUMENT).exists():
        raise PlanError(
            f"{folder}: holds other files ({min(foreign)}) and no {DOCUMENT}; choose a new or "
            "empty folder"
        )


def _ours(name: str) -> bool:
    return name == DOCUMENT or name.startswith(".") or _OURS.fullmatch(name) is not None
