"""The model that a command works on: loaded, and compiled with or without a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import api
from ..model.load import Loaded, load, usable_backend
from ..plans.decision_files import load_decision

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


@dataclass(frozen=True)
class Choice:
    """What says which sublayers a model skips, and what its attention sees.

    Attributes:
        profile: a profile's folder, by which it is chosen.
        alpha: acceleration ratio of that choice.
        plan: the path of a plan or another decision, instead of a choice.
        context: tokens at which alpha counts time; None where it counts sublayers.
        table: the file of the latency table of those times.
    """

    profile: Path | None
    alpha: float
    plan: Path | None = None
    context: int | None = None
    table: Path | None = None


def skipping_model(loaded: Loaded, choice: Choice, backend: str, steps: Steps) -> Any:
    """Return the model compiled with a plan, or as it is if nothing says what to skip.

    Args:
        loaded: the model.
        choice: what says so.
        backend: inner torch.compile backend.
        steps: shows what is going on.
    """
    if choice.profile is None and choice.plan is None:
        return loaded.model
    usable = inner_backend(backend, loaded.model, steps)
    options: dict[str, Any] = {"context": choice.context, "table": choice.table}
    if choice.plan is not None:
        options["plan"] = load_decision(choice.plan)
    with steps.step("compile"):
        return api.compile(loaded.model, choice.profile, choice.alpha, backend=usable, **options)
