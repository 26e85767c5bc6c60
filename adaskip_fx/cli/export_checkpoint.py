"""``adaskip-fx export --checkpoint``: a model with a plan as a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .reporting import print_json

if TYPE_CHECKING:
    from ..plans.actions import Phase
    from ..utils.progress import Steps


def write_checkpoint(
    plan: Path,
    model: str,
    folder: Path,
    phase: Phase | None,
    fold_scales: bool,
    per_layer_config: bool,
    as_json: bool,
    steps: Steps,
) -> None:
    """Write the checkpoint and say what is in it.

    Args:
        plan: The plan's file.
        model: A folder, a file or a name; it is loaded in the dtype that it is stored in.
        folder: Where to.
        phase: Of a plan whose phases differ, that whose part is used for both.
        fold_scales: See `adaskip_fx.checkpoint.export_checkpoint`.
        per_layer_config: Likewise.
        as_json: Whether to print JSON.
        steps: Shows what is going on.
    """
    from ..checkpoint import export_checkpoint
    from ..plans.skip_plan import PlanError, SkipPlan
    from ..serving.static_plan import static_plan
    from .subject import loaded_model

    if plan.is_dir():
        raise PlanError(
            f"{plan}: a folder, and a checkpoint is of one plan; name one of the plan files in it"
        )
    read = SkipPlan.load(plan)
    read = read if phase is None else static_plan(read, phase)
    loaded = loaded_model(model, "auto", _stored_dtype(model), steps)
    with steps.step("write the checkpoint and compare it"), _no_bars():
        exported = export_checkpoint(
            loaded.model,
            read,
            folder,
            tokenizer=loaded.tokenizer,
            fold_scales=fold_scales,
            per_layer_config=per_layer_config,
        )
    if not as_json:
        typer.echo(str(exported))
        return
    print_json(
        {
            "folder": str(exported.folder),
            "plan": read.digest,
            "layers": exported.layers,
            "layers_before": exported.layers_before,
            "zeros": [str(s) for s in exported.zeros],
            "windows": {str(s): w.tokens for s, w in exported.windows.items()},
            "scales": {str(s): f for s, f in exported.scales.items()},
            "error": exported.error,
        }
    )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _stored_dtype(name: str) -> str | None:
    """Return the name of the dtype that a model is stored in; None where it does not say."""
    from transformers import AutoConfig

    if name.endswith(".gguf"):
        return None
    try:
        stored = str(AutoConfig.from_pretrained(name).dtype).removeprefix("torch.")
    except (OSError, ValueError):  # said in other words when it is loaded
        return None
    return stored if stored in ("float32", "bfloat16", "float16") else None
