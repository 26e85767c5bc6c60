"""The model that a command works on: loaded, and compiled with or without a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import api
from ..model.load import Loaded, load, usable_backend
from ..plans.decision_files import load_decision
from ..plans.decisions import Decision

if TYPE_CHECKING:
    from ..utils.progress import Steps


def loaded_model(name: str, device: str, dtype: str | None, steps: Steps) -> Loaded:
    """Load a model and its tokenizer; see :func:`adaskip_fx.model.load.load`."""
    with steps.step("load the model"):
        return load(name, device, dtype)


def inner_backend(wanted: str, model: Any, steps: Steps) -> str:
    """Return the inner backend that can be used for `model`, and say so if it is another one."""
    usable, reason = usable_backend(wanted, model.device)
    if reason is not None:
        steps.say(reason)
    return usable


def compiled_model(
    name: str, device: str, dtype: str | None, backend: str, steps: Steps
) -> tuple[Loaded, Any]:
    """Load a model and compile it with nothing skipped and nothing learned online.

    Returns:
        What was loaded, and the compiled model.
    """
    loaded = loaded_model(name, device, dtype, steps)
    usable = inner_backend(backend, loaded.model, steps)
    with steps.step("capture and compile"):
        return loaded, api.build(loaded.model, None, backend=usable)


def skipping_model(
    loaded: Loaded,
    profile: Path | None,
    alpha: float,
    plan: Path | None,
    backend: str,
    steps: Steps,
) -> Any:
    """Return the model compiled with a plan, or as it is if nothing says what to skip.

    Args:
        loaded: the model.
        profile: a profile's folder, from which AdaSkip chooses.
        alpha: acceleration ratio of that choice.
        plan: the path of a plan or another decision, instead of a choice.
        backend: inner torch.compile backend.
        steps: shows what is going on.
    """
    if profile is None and plan is None:
        return loaded.model
    usable = inner_backend(backend, loaded.model, steps)
    decision: Decision | None = None if plan is None else load_decision(plan)
    with steps.step("compile"):
        return api.compile(loaded.model, profile, alpha, plan=decision, backend=usable)
