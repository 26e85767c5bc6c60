"""``adaskip-fx export``: a plan in the form in which something else takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..plans.actions import Phase
from .options import AsJson, Debug
from .reporting import print_json, reported


def export(
    plan: Annotated[Path, typer.Argument(help="File of a plan, as fit and windows write it.")],
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Print what vllm serve takes as --hf-overrides.")
    ] = False,
    phase: Annotated[
        Phase | None,
        typer.Option(
            help="Of a plan whose phases differ: the phase whose part is used for both.",
            show_default="the plan must be one for both",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print a plan in the form in which an engine takes it."""
    if not vllm:
        raise typer.BadParameter("say for whom: --vllm")
    with reported(debug):
        from ..plans.skip_plan import PlanError, SkipPlan
        from ..serving.overrides import KEY, overrides
        from ..serving.static_plan import static_plan

        if plan.is_dir():
            raise PlanError(
                f"{plan}: a folder, and an engine runs one plan; name one of the plan files in it"
            )
        loaded = SkipPlan.load(plan)
        result = overrides(loaded, plan.parent, phase)
        served = static_plan(loaded, phase)
        if as_json:
            skipped = [str(s) for s in served.skipped("prefill")]
            windows = [str(s) for s in served.windows.prefill]
            about = {"digest": served.digest, "skipped": skipped, "windows": windows}
            print_json({"hf_overrides": {KEY: result[KEY]}, **about})
        else:
            typer.echo(json.dumps(result, separators=(",", ":")))
