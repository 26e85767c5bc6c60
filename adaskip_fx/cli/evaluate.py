"""``adaskip-fx eval``: put tasks to a model, as it is or with sublayers skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    Alpha,
    AsJson,
    Backend,
    Debug,
    Device,
    Dtype,
    Model,
    OptionalProfile,
    TableFile,
    TimedContext,
)
from .reporting import console, print_json, reported

if TYPE_CHECKING:
    from ..evaluation.result import Evaluation
    from ..evaluation.task import Task
    from ..utils.progress import Steps
    from .subject import Choice

_TASKS = ("perplexity", "passkey")


DecisionPath = Annotated[
    Path | None,
    typer.Option(help="A plan's file or a decision's folder, instead of what AdaSkip would skip."),
]
TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="A task; may be repeated.", show_default="perplexity and passkey"
    ),
]
TaskFiles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK=PATH",
        help="A file for a task; TASK.train=PATH for one to learn from. Given twice for a task, "
        "it is done on both.",
    ),
]
TaskOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TASK.OPTION=VALUE",
        help="An option of a task, as JSON: passkey.forced=false.",
    ),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Examples of a task at most.", show_default="4 to 20")
]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a prompt at most.")]
Seed = Annotated[int, typer.Option(help="Seeds all that is drawn.")]
Compare = Annotated[bool, typer.Option(help="Put the tasks to the model as it is as well.")]
OutFile = Annotated[Path | None, typer.Option("--out", help="File to write all results to (JSON).")]


def evaluate(
    model: Model,
    profile: OptionalProfile = None,
    alpha: Alpha = 1.2,
    context: TimedContext = None,
    table: TableFile = None,
    plan: DecisionPath = None,
    task: TaskNames = None,
    data: TaskFiles = None,
    changes: TaskOptions = None,
    samples: Samples = None,
    max_length: MaxLength = 2048,
    seed: Seed = 0,
    compare: Compare = True,
    out: OutFile = None,
    backend: Backend = "inductor",
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure what skipping costs, on tasks that need no network, and what was really skipped."""
    options: dict[str, Any] = {"length": max_length, "seed": seed}
    if samples is not None:
        options["samples"] = samples
    with reported(debug) as steps:
        from ..utils.files import write_atomically
        from .subject import Choice

        tasks = _tasks(task or list(_TASKS), data or [], changes or [], options)
        subject = (model, device, dtype, backend)
        choice = Choice(profile, alpha, plan, context, table)
        found = _evaluated(subject, choice, tasks, compare, steps)
        if out is not None:
            write_atomically(out, json.dumps(found.to_json(), indent=1).encode())
            steps.say(f"saved to {out}")
        if as_json:
            print_json(found.to_json())
        else:
            from ..evaluation.tables import show

            show(found, console())


def _tasks(
    names: list[str], data: list[str], changes: list[str], options: dict[str, Any]
) -> Sequence[Task]:
    """Return the tasks that the options name; what is wrong with them is a usage error."""
    from ..evaluation.task_options import tasks_of

    try:
        return tasks_of(names, data, changes, options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _evaluated(
    subject: tuple[str, str, str | None, str],
    choice: Choice,
    tasks: Sequence[Task],
    compare: bool,
    steps: Steps,
) -> Evaluation:
    """Load the model, given by name, device, dtype and backend, and put the tasks to it."""
    from ..evaluation.evaluate import evaluate as measure
    from .subject import loaded_model, skipping_model

    name, device, dtype, backend = subject
    loaded = loaded_model(name, device, dtype, steps)
    model = skipping_model(loaded, choice, backend, steps)
    skips = model is not loaded.model
    with steps.step("evaluate") as advance:
        return measure(
            model,
            loaded.tokenizer,
            tasks,
            reference=loaded.model if compare and skips else None,
            about={"name": loaded.name, **(_ratio(choice) if skips else {"alpha": None})},
            progress=advance,
        )


def _ratio(choice: Choice) -> dict[str, Any]:
    """Return what of a choice is on record: the ratio, and where it counts time."""
    alpha = choice.alpha if choice.plan is None else None
    return {"alpha": alpha, **({"context": choice.context} if choice.context else {})}
