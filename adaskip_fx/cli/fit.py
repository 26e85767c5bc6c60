"""``adaskip-fx fit``: from texts to a plan whose skipped sublayers lose the least."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from adaskip_fx.cli.options import Alpha, Backend, Debug, Device, Dtype, Model, console, reported
from adaskip_fx.plans.surrogate import SurrogateKind

if TYPE_CHECKING:
    from adaskip_fx.fitting import LatencyBound

Phases = Literal["both", "prefill", "decode"]
Rungs = Literal["scale", "diagonal", "low_rank", "linear", "normalized"]
assert set(get_args(Rungs)) == set(get_args(SurrogateKind))


def fit(
    model: Model,
    profile: Annotated[Path, typer.Argument(help="Folder that calibrate wrote.")],
    out: Annotated[Path, typer.Argument(help="File to write the plan to (JSON).")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH of a UTF-8 text of one kind (prose, code, ...); may be repeated.",
            show_default="the Python reference in pydoc_data.topics",
        ),
    ] = None,
    alpha: Alpha = 1.2,
    kind: Annotated[Rungs, typer.Option(help="What stands in for a sublayer.")] = "normalized",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of low_rank; chosen on unseen texts if not given.")
    ] = None,
    within: Annotated[
        float | None,
        typer.Option(help="Choose no rank that takes more than this share of a sublayer's time."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="For --within: file that measure --ranks wrote.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="For --within: tokens of a typical request.")
    ] = None,
    phase: Annotated[
        Phases | None, typer.Option(help="For --within: in which it holds.", show_default="both")
    ] = None,
    search: Annotated[
        bool, typer.Option(help="Choose sublayers by what is lost, or by AdaSkip's similarity.")
    ] = True,
    in_order: Annotated[
        bool,
        typer.Option(
            "--in-order/--at-once",
            help="Fit surrogates in the order of the plan, or all in one pass over the texts.",
        ),
    ] = True,
    own: Annotated[
        int, typer.Option(min=0, help="Samples that the model writes itself, to fit on as well.")
    ] = 64,
    steps: Annotated[int, typer.Option(min=0, help="Of refinement by gradient descent.")] = 300,
    max_length: Annotated[int, typer.Option(min=64, help="Tokens of a text at most.")] = 2048,
    samples: Annotated[int, typer.Option(min=2, help="Texts of each kind at most.")] = 16,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    backend: Backend = "eager",
    dtype: Dtype = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Choose what to skip by what is lost, fit what stands in for it, and save the plan."""
    with reported(debug):
        from adaskip_fx.data.reference_text import calibration_samples
        from adaskip_fx.fitting import Recipe, SurrogateSpec
        from adaskip_fx.fitting import fit as learn
        from adaskip_fx.model.load import load
        from adaskip_fx.profiles.profile import Profile
        from adaskip_fx.utils.progress import Steps

        if out.is_dir() or not out.parent.is_dir():  # before minutes of work
            raise ValueError(f"{out}: a plan is a file in a folder that exists; choose another")
        bound = _bound(within, table, context, phase)
        rung = SurrogateSpec(kind, rank, bound=bound)
        sources = _sources(text)
        measured = Profile.load(profile)
        report = Steps(console(stderr=True))
        with report.step("load the model"):
            loaded = load(model, device, dtype)
        measured.check(loaded.model)
        if bound is not None:
            bound.table.check(loaded.model)
            if bound.table.warning:
                report.say(bound.table.warning)
        texts = {
            name: calibration_samples(words, max_length, samples) for name, words in sources.items()
        }
        recipe = Recipe(search, rung, own, max_length, steps, seed=seed, in_order=in_order)
        with report.step("fit"):
            plan = learn(
                loaded.model,
                loaded.tokenizer,
                texts,
                measured,
                alpha,
                recipe,
                backend=backend,
                say=report.say,
            )
        plan.save(out)
        typer.echo(str(plan))
        typer.echo(f"saved to {out}", err=True)


def _bound(
    within: float | None, table: Path | None, context: int | None, phase: Phases | None
) -> LatencyBound | None:
    """What --within says; None without it.

    Raises:
        ValueError: options that do not go together, a table that cannot be read or has no ranks,
            or where none fits.
    """
    from adaskip_fx.fitting import LatencyBound
    from adaskip_fx.latency.table import LatencyTable

    if within is None and table is None and context is None and phase is None:
        return None
    if within is None or table is None or context is None:
        raise ValueError(
            "--within, --table and --context go together: a share of a sublayer's time, the file "
            "that adaskip-fx measure --ranks wrote, and the tokens of a typical request"
        )
    return LatencyBound(LatencyTable.load(table), context, within, phase or "both")


def _sources(given: list[str] | None) -> dict[str, list[str] | None]:
    """The text of each kind; None for the calibration half of the Python reference."""
    if not given:
        return {"pydoc": None}
    found: dict[str, list[str] | None] = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--text {item}: write NAME=PATH, for example --text prose=book.txt")
        if name in found:
            raise ValueError(f"--text {item}: {name} was given before; name each kind once")
        try:
            found[name] = [Path(path).read_text("utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from error
    return found
