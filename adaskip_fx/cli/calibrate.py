"""``adaskip-fx calibrate``: measure how much each sublayer matters, and save the profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Debug, Device, Dtype, Model
from .reporting import print_json, reported


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write the profile to.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="UTF-8 text to measure on, cut into samples; may be repeated.",
            show_default="the Python reference in pydoc_data.topics",
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample at most.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Samples at most.")] = 8,
    windows: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS,...",
            help="Windows to measure K/V heads through, in the same runs: last tokens seen.",
            show_default="none",
        ),
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that they show too.")] = 4,
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure how much each sublayer changes the residual stream, and save the profile."""
    tokens = _numbers(windows)
    with reported(debug) as steps:
        from ..calibration.calibrate import calibrate as measure
        from ..data.reference_text import calibration_samples
        from ..model.load import load
        from ..plans.windows import Window
        from ..profiles.folder import check_target
        from ..utils.files import read_text
        from .json_views import profile_json

        check_target(out)  # before minutes of work
        sources = None if text is None else [read_text(file) for file in text]
        with steps.step("load the model"):
            loaded = load(model, device, dtype)
        chosen = calibration_samples(sources, max_length, samples)
        with steps.step("calibrate") as advance:
            profile = measure(
                *(loaded.model, loaded.tokenizer, chosen, max_length),
                progress=advance,
                windows=[Window(n, sinks) for n in tokens],
            )
        profile.save(out)
        if as_json:
            print_json({"saved_to": str(out), **profile_json(profile)})
        else:
            typer.echo(str(profile))
        steps.say(f"saved to {out}")


def _numbers(windows: str | None) -> list[int]:
    """Return the numbers of tokens that an option names."""
    numbers = [] if windows is None else windows.split(",")
    if not all(number.strip().isdecimal() and int(number) for number in numbers):
        raise typer.BadParameter("numbers of tokens, with commas between", param_hint="--windows")
    return [int(number) for number in numbers]
