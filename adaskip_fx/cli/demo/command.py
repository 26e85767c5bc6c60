"""The command ``adaskip-fx demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import MODEL, Alpha, AsJson, Backend, Debug, Device
from ..reporting import console, print_json, reported


def demo(
    alpha: Alpha = 1.2,
    device: Device = "auto",
    model: Annotated[
        str | None, typer.Option(help=MODEL, show_default="SmolLM2-135M-Instruct")
    ] = None,
    backend: Backend = "inductor",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find five pass keys in long texts, with and without skipping, and show what it did."""
    with reported(debug) as steps:
        from ...model.load import packaged_model
        from ..subject import inner_backend, loaded_model
        from .run import run_demo
        from .show import show

        loaded = loaded_model(model or str(packaged_model()), device, None, steps)
        result = run_demo(
            loaded.model,
            loaded.tokenizer,
            steps,
            alpha=alpha,
            backend=inner_backend(backend, loaded.model, steps),
            name=loaded.name,
        )
        if as_json:
            print_json(result.to_json())
        else:
            show(result, console())
