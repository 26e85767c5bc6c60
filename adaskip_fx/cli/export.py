"""``adaskip-fx export``: a plan in the form in which something else takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..plans.actions import Phase
from .export_checkpoint import write_checkpoint
from .options import MODEL, AsJson, Debug
from .reporting import print_json, reported


def export(
    plan: Annotated[Path, typer.Argument(help="File of a plan, as fit and windows write it.")],
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Print what vllm serve takes as --hf-overrides.")
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write the model with the plan there, as a plain checkpoint."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"For --checkpoint. {MODEL}")] = None,
    fold_scales: Annotated[
        bool,
        typer.Option(
            "--fold-scales", help="Fold scales into weights; exact but for the epsilon of norms."
        ),
    ] = False,
    per_layer_config: Annotated[
        bool,
        typer.Option(
            "--per-layer-config", help="Name what is zeros in the configuration, for transformers."
        ),
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
    """Print or write a plan in the form in which something else takes it."""
    if vllm == (checkpoint is not None):
        raise typer.BadParameter("say what is wanted: --vllm, or --checkpoint FOLDER")
    if checkpoint is not None and model is None:
        raise typer.BadParameter("--checkpoint needs the model: --model MODEL")
    with reported(debug) as steps:
        if checkpoint is None or model is None:
            _print_overrides(plan, phase, as_json)
        else:
            folds = fold_scales, per_layer_config
            write_checkpoint(plan, model, checkpoint, phase, *folds, as_json, steps)


def _print_overrides(plan: Path, phase: Phase | None, as_json: bool) -> None:
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
