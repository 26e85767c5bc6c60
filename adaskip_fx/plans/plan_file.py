"""A plan as a file: JSON, and a file of tensors beside it for surrogates that are not scales."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaskip_fx.plans.actions import PlanError
from adaskip_fx.plans.fingerprint import Fingerprint
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import NO_WINDOWS, Windows
from adaskip_fx.utils.files import (
    JSON,
    check_digest,
    check_document,
    read_document,
    write_atomically,
)

if TYPE_CHECKING:
    from adaskip_fx.plans.skip_plan import SkipPlan

SCHEMA = 2
_KEYS = ("digest", "sublayers", "prefill", "decode", "compensation", "tensors")
_TENSOR_FILE = re.compile(r"compensation-[0-9a-f]{16}\.safetensors")
_REDO = "build the plan again and save it"


def document(plan: SkipPlan) -> dict[str, JSON]:
    """Return the JSON of a plan; `tensors` names the file beside it, if there is one."""
    tensors = _with_tensors(plan)
    return {
        "schema": SCHEMA,
        "digest": plan.digest,
        **actions_json(plan),
        "compensation": plan.surrogates.to_json(),
        "tensors": f"compensation-{tensors.digest}.safetensors" if tensors else None,
        **({"fingerprint": asdict(plan.fingerprint)} if plan.fingerprint else {}),
    }


def actions_json(plan: SkipPlan) -> dict[str, JSON]:
    """Return the part of the JSON that says what happens to each sublayer."""
    return {
        "sublayers": [str(s) for s in plan.sublayers],
        "prefill": {str(s): action.value for s, action in plan.prefill.items()},
        "decode": {str(s): action.value for s, action in plan.decode.items()},
        # Absent where it is off, so that digests of plans from before it existed stay the same.
        **({"last_token_full": True} if plan.last_token_full else {}),
        **({"windows": plan.windows.to_json()} if plan.windows else {}),
    }


def save(plan: SkipPlan, path: Path) -> None:
    """Write `plan` to the file `path`, and its tensors, if it has any, to a file beside it."""
    data = document(plan)
    save_tensors(plan, path.parent)
    write_atomically(path, json.dumps(data, indent=1).encode())


def save_tensors(plan: SkipPlan, folder: Path) -> None:
    """Write the tensors of `plan`, if it has any, to the file that its JSON names, in `folder`."""
    tensors = _with_tensors(plan)
    if tensors:
        tensors.save(folder / f"compensation-{tensors.digest}.safetensors")


def load(plan_type: type[SkipPlan], path: Path) -> SkipPlan:
    """Return the plan that was saved to `path`, made by `plan_type`.

    Raises:
        PlanError: the message says which file, what is wrong and what to do.
    """
    data = read_document(path, SCHEMA, _KEYS, PlanError, _REDO)
    return _plan(plan_type, path, data, path.parent)


def parse(plan_type: type[SkipPlan], data: object, source: str, folder: Path) -> SkipPlan:
    """Return the plan whose JSON is `data`, made by `plan_type`.

    Args:
        plan_type: the class of plans.
        data: what `document` returned.
        source: where it is from, for messages.
        folder: where the file of its tensors is.

    Raises:
        PlanError: the message says what is wrong and what to do.
    """
    checked = check_document(source, data, SCHEMA, _KEYS, PlanError, _REDO)
    return _plan(plan_type, source, checked, folder)


def _plan(
    plan_type: type[SkipPlan], path: Path | str, data: dict[str, Any], folder: Path
) -> SkipPlan:
    try:
        plan = plan_type(
            tuple(map(Sublayer.parse, data["sublayers"])),
            {Sublayer.parse(name): action for name, action in data["prefill"].items()},
            {Sublayer.parse(name): action for name, action in data["decode"].items()},
            Surrogates.from_json(data["compensation"], _load_tensors(folder, data["tensors"])),
            data.get("last_token_full", False) is True,
            Windows.from_json(data["windows"]) if "windows" in data else NO_WINDOWS,
            Fingerprint(**data["fingerprint"]) if "fingerprint" in data else None,
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise PlanError(f"{path}: not a valid plan ({error}); {_REDO}") from error
    check_digest(path, data["digest"], plan.digest, PlanError, _REDO)
    return plan


def _with_tensors(plan: SkipPlan) -> Surrogates:
    """Return the surrogates that JSON does not hold."""
    by_sublayer = plan.surrogates.by_sublayer
    return Surrogates({s: c for s, c in by_sublayer.items() if c.factor is None})


def _load_tensors(folder: Path, name: object) -> Surrogates | None:
    """Return the surrogates in the file in `folder` that a plan names, if it names one."""
    if name is None:
        return None
    if not isinstance(name, str) or not _TENSOR_FILE.fullmatch(name):  # never outside the folder
        raise ValueError(f"{name!r} is not the name of a file of surrogates")
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name} is missing: copy it along with the plan")
    return Surrogates.load(folder / name)
