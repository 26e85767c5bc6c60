"""``adaskip-fx eval``: put tasks to a model, as it is or with sublayers skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaskip_fx.cli.options import Alpha, Backend, Debug, Device, Dtype, Model, console, reported

if TYPE_CHECKING:
    from adaskip_fx.model.load import Loaded
    from adaskip_fx.utils.progress import Steps

    from ..evaluation.task import Task


def evaluate(
    model: Model,
    profile: Annotated[
        Path | None,
        typer.Argument(
            help="Folder that calibrate wrote; without it and --plan nothing is skipped."
        ),
    ] = None,
    alpha: Alpha = 1.2,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="A plan's file or a decision's folder, instead of what AdaSkip would skip."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task; may be repeated.", show_default="perplexity and passkey"),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="TASK=PATH: a file for a task; TASK.train=PATH for one to learn from. Given twice "
            "for a task, it is done on both."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="TASK.OPTION=VALUE, as JSON: passkey.forced=false."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Examples of a task at most.", show_default="4 to 20")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a prompt at most.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    compare: Annotated[
        bool, typer.Option(help="Put the tasks to the model as it is as well.")
    ] = True,
    out: Annotated[Path | None, typer.Option("--json", help="Write all results to it.")] = None,
    backend: Backend = "inductor",
    dtype: Dtype = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Measure what skipping costs, on tasks that need no network, and what was really skipped."""
    with reported(debug):
        from adaskip_fx.model.load import load
        from adaskip_fx.utils.files import write_atomically
        from adaskip_fx.utils.progress import Steps

        from ..evaluation.evaluate import evaluate as measure
        from ..evaluation.tables import show
        from ..evaluation.task_options import tasks_of

        options: dict[str, Any] = {"length": max_length, "seed": seed}
        if samples is not None:
            options["samples"] = samples
        names = task or ["perplexity", "passkey"]
        tasks: Sequence[Task] = tasks_of(names, data or [], changes or [], options)
        steps = Steps(console(stderr=True))
        with steps.step("load the model"):
            loaded = load(model, device, dtype)
        subject = _subject(loaded, profile, alpha, plan, backend, steps)
        skips = subject is not loaded.model
        with steps.step("evaluate") as advance:
            found = measure(
                subject,
                loaded.tokenizer,
                tasks,
                reference=loaded.model if compare and skips else None,
                about={"name": loaded.name, "alpha": alpha if skips and plan is None else None},
                progress=advance,
            )
        show(found, console())
        if out is not None:
            write_atomically(out, json.dumps(found.to_json(), indent=1).encode())


def _subject(
    loaded: Loaded,
    profile: Path | None,
    alpha: float,
    plan: Path | None,
    backend: str,
    steps: Steps,
) -> Any:
    """The model to evaluate: compiled if anything says what to skip."""
    from adaskip_fx.api import compile
    from adaskip_fx.model.load import usable_backend
    from adaskip_fx.plans.serialization import load_decision

    if profile is None and plan is None:
        return loaded.model
    usable, why = usable_backend(backend, loaded.model.device)
    if why is not None:
        steps.say(why)
    chosen = None if plan is None else load_decision(plan)
    with steps.step("compile"):
        return compile(loaded.model, profile, alpha, plan=chosen, backend=usable)
