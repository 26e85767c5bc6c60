"""``adaskip-fx bench``: time prompts and decode steps of a model, with and without a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Alpha, AsJson, Backend, Debug, Device, Dtype, Model, OptionalProfile, PlanFile
from .reporting import console, plain_table, print_json, reported

if TYPE_CHECKING:
    from rich.console import Console

    from ..measurement.bench import StepTimes
    from ..plans.skip_plan import SkipPlan

_CONTEXTS = (1024,)
_FULL = "nothing skipped"


Contexts = Annotated[
    list[int] | None,
    typer.Option(
        metavar="TOKENS",
        help="Tokens of a prompt, and tokens stored at a decode step; may be repeated.",
        show_default="1024",
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Rows.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each is timed, in turns.")]
Eager = Annotated[
    bool, typer.Option("--eager", help="Time the model as transformers runs it, too.")
]


def bench(
    model: Model,
    profile: OptionalProfile = None,
    alpha: Alpha = 1.2,
    plan: PlanFile = None,
    context: Contexts = None,
    batch: Batch = 1,
    rounds: Rounds = 5,
    eager: Eager = False,
    backend: Backend = "inductor",
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time prompts and decode steps of a model on this machine, with and without a plan.

    Times are medians over rounds in which all take turns; compiling, linking and what a decode
    window measures are not in them. The same model with nothing skipped is always timed, so that
    what skipping gains is told apart from what compiling gains.
    """
    with reported(debug) as steps:
        from ..measurement.bench import bench as measure
        from .subject import compiled_model

        chosen = _plan(profile, alpha, plan)  # before minutes of work
        loaded, compiled = compiled_model(model, device, dtype, backend, steps)
        plans = {_FULL: compiled.adaskip.plan}
        if chosen is not None:
            plans["plan"] = chosen
        with steps.step("time") as advance:
            times = measure(
                compiled,
                plans,
                context or _CONTEXTS,
                batch=batch,
                rounds=rounds,
                eager=loaded.model if eager else None,
                progress=advance,
            )
        about = conditions(compiled, loaded.name, batch, rounds)
        if as_json:
            described = None if chosen is None else chosen.to_json()
            print_json(
                {"conditions": about, "plan": described, "times": [t.to_json() for t in times]}
            )
        else:
            _show(about, chosen, times, console())


def _plan(profile: Path | None, alpha: float, plan: Path | None) -> SkipPlan | None:
    """Return the plan of a file, or what AdaSkip chooses by a profile; None without either."""
    from ..plans.decision_files import load_decision
    from ..plans.skip_plan import SkipPlan
    from ..policies import AdaSkip
    from ..profiles.profile import Profile

    if plan is not None:
        decision = load_decision(plan)
        if not isinstance(decision, SkipPlan):
            raise ValueError(f"{plan}: holds several plans; name one of its plan files instead")
        return decision
    return None if profile is None else AdaSkip().plan(Profile.load(profile), alpha)


def conditions(compiled: Any, name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return what times of a compiled model depend on besides the plan, JSON-compatible."""
    from ..measurement.environment import environment
    from ..model.handle import runtime_of

    return {
        "name": name,
        "model": type(compiled).__name__,
        "parameters": compiled.num_parameters(),
        "dtype": str(compiled.dtype).removeprefix("torch."),
        "backend": runtime_of(compiled).graphs.backend,
        "batch": batch,
        "rounds": rounds,
        **environment(compiled),
    }


def _show(
    about: Mapping[str, Any], plan: SkipPlan | None, times: Sequence[StepTimes], console: Console
) -> None:
    described = ", ".join(f"{name} {value}" for name, value in about.items())
    for line in (described, *([] if plan is None else [str(plan)])):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    show_times(times, console)


def show_times(times: Sequence[StepTimes], console: Console, base: str = _FULL) -> None:
    """Print a row for each phase and context: medians, and how much faster each contender is.

    Args:
        times: of the contenders, at the same phases and contexts.
        console: where to print.
        base: the contender that the others are compared with.
    """
    names = list(dict.fromkeys(t.contender for t in times))
    table = plain_table("", "tokens", *names)
    points: dict[tuple[str, int], dict[str, StepTimes]] = {}
    for time in times:
        points.setdefault((time.phase, time.context), {})[time.contender] = time
    for (phase, tokens), found in points.items():
        title = "prompt" if phase == "prefill" else "decode step"
        cells = (_cell(found[name], found[base]) for name in names)
        table.add_row(title, f"{tokens:,}", *cells)
    console.print(table)


def _cell(time: StepTimes, base: StepTimes) -> str:
    text = f"{time.median:.3f} s" if time.phase == "prefill" else f"{time.median * 1000:.1f} ms"
    return text if time is base else f"{text} ({base.median / time.median:.2f}x)"
