"""The command line: ``adaskip-fx --help`` names its commands.

torch and transformers take seconds to import, so commands import what they need when they run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .doctor import doctor
from .evaluate import evaluate
from .fit import fit
from .options import MODEL, Alpha, Backend, Debug, Device, Dtype, Model
from .options import console as _console
from .options import reported as _reported

if TYPE_CHECKING:
    from ..plans.skip_plan import SkipPlan

app = typer.Typer(
    help="AdaSkip (arXiv 2501.02336) for Hugging Face decoders: skip the sublayers that matter "
    "least, learned from your texts and while decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("doctor")(doctor)
app.command("eval")(evaluate)
app.command("fit")(fit)


@app.command()
def demo(
    alpha: Alpha = 1.2,
    device: Device = "auto",
    model: Annotated[
        str | None, typer.Option(help=MODEL, show_default="SmolLM2-135M-Instruct")
    ] = None,
    backend: Backend = "inductor",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Find five pass keys in long texts, with and without skipping, and show what it did."""
    with _reported(debug):
        from ..model.load import load, packaged_model, usable_backend
        from ..utils.progress import Steps
        from .demo import Options, make_texts, run_demo, show

        steps = Steps(_console(stderr=True))
        with steps.step("load the model"):
            loaded = load(model or str(packaged_model()), device)
        usable, why = usable_backend(backend, loaded.model.device)
        if why is not None:
            steps.say(why)
        options = Options(alpha=alpha, backend=usable)
        texts = make_texts(loaded.tokenizer, options)
        result = run_demo(loaded.model, loaded.tokenizer, texts, options, steps, loaded.name)
        if as_json:
            typer.echo(json.dumps(result.to_json(), indent=1))
        else:
            show(result, _console())


@app.command()
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write the profile to.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text to measure on, cut into samples; may be repeated.",
            show_default="the Python reference in pydoc_data.topics",
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample at most.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Samples at most.")] = 8,
    dtype: Dtype = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Measure how much each sublayer changes the residual stream, and save the profile."""
    with _reported(debug):
        from ..calibration.calibrate import calibrate as measure
        from ..data.reference_text import calibration_samples
        from ..model.load import load
        from ..profiles.profile import check_target
        from ..utils.progress import Steps

        check_target(out)  # before minutes of work
        sources = None if text is None else [_read(file) for file in text]
        steps = Steps(_console(stderr=True))
        with steps.step("load the model"):
            loaded = load(model, device, dtype)
        chosen = calibration_samples(sources, max_length, samples)
        with steps.step("calibrate") as advance:
            profile = measure(loaded.model, loaded.tokenizer, chosen, max_length, progress=advance)
        profile.save(out)
        typer.echo(str(profile))
        typer.echo(f"saved to {out}", err=True)


@app.command()
def generate(
    model: Model,
    profile: Annotated[Path, typer.Argument(help="Folder that calibrate wrote.")],
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from this file; - is standard input.")
    ] = None,
    alpha: Alpha = 1.2,
    plan: Annotated[
        Path | None, typer.Option(help="File that fit wrote, instead of a choice by alpha.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 64,
    chat: Annotated[
        bool, typer.Option(help="Put the prompt into the tokenizer's chat template, if any.")
    ] = True,
    backend: Backend = "inductor",
    dtype: Dtype = None,
    device: Device = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Print what it did to stderr.")] = False,
    debug: Debug = False,
) -> None:
    """Answer a prompt greedily with sublayers skipped, token by token."""
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give a prompt, either as argument or with --prompt-file")
    with _reported(debug):
        from ..model.load import load, usable_backend
        from ..profiles.profile import Profile
        from .generate import stream

        words = _read(prompt_file) if prompt_file is not None else prompt or ""
        measured = Profile.load(profile)
        loaded = load(model, device, dtype)
        usable, why = usable_backend(backend, loaded.model.device)
        if why is not None:
            typer.echo(why, err=True)
        options: dict[str, Any] = {"alpha": alpha, "limit": max_new_tokens, "plan": plan}
        fast, _output = stream(loaded, measured, words, backend=usable, chat=chat, **options)
        if stats:
            typer.echo(str(fast.adaskip), err=True)


@app.command()
def measure(
    model: Model,
    out: Annotated[Path, typer.Argument(help="File to write the table to.")],
    context: Annotated[
        list[int], typer.Option(help="Tokens at which to measure; may be repeated.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often each plan is timed.")] = 5,
    ranks: Annotated[
        bool, typer.Option("--ranks", help="Measure low-rank surrogates too, for fit --within.")
    ] = False,
    backend: Backend = "inductor",
    dtype: Dtype = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Measure what each sublayer costs on this device, for budgets of time, and save the table."""
    with _reported(debug):
        from ..utils.progress import Steps
        from .measure import measure_table

        steps = Steps(_console(stderr=True))
        table = measure_table(
            model, out, context, batch, rounds, ranks, backend, dtype, device, steps
        )
        typer.echo(str(table))
        if table.warning:
            typer.echo(table.warning, err=True)
        typer.echo(f"saved to {out}", err=True)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A profile's or decision's folder, or the file of a plan or a latency table."
        ),
    ],
    alpha: Annotated[
        float | None,
        typer.Option(help="Show what a profile would skip at this ratio.", show_default="1.2"),
    ] = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="Show the outer graph before and after.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help=MODEL, show_default="two layers of a tiny Llama")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show a profile, a decision or a latency table, and what a plan does to a graph."""
    if path.is_file() and alpha is not None:
        raise typer.BadParameter("a plan is made for one alpha already; --alpha is for profiles")
    with _reported(debug):
        plan = _show_file(path, alpha, need_plan=graph)
        if graph and plan is not None:
            _show_graph(plan, model)


def _show_file(path: Path, alpha: float | None, need_plan: bool) -> SkipPlan | None:
    """Print what is at `path`; returns the plan that it holds or leads to."""
    from ..latency.table import LatencyTable, is_table
    from ..plans.serialization import DOCUMENT, load_decision
    from ..plans.skip_plan import SkipPlan
    from ..policies import AdaSkip
    from ..profiles.profile import Profile

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / DOCUMENT).is_file():
        if alpha is not None or need_plan:
            raise ValueError(f"{path}: holds several plans; name one of its plan files instead")
        typer.echo(str(load_decision(path)))
        return None
    if is_table(path):
        if need_plan:
            raise ValueError(f"{path}: a latency table has no graph; --graph is for plans")
        typer.echo(str(LatencyTable.load(path)))
        return None
    if path.is_file():
        plan = SkipPlan.load(path)
        typer.echo(str(plan))
        return plan
    profile = Profile.load(path)
    typer.echo(str(profile))
    typer.echo(f"model: {profile.fingerprint}")
    about = {**profile.calibration, **profile.versions}
    typer.echo("measured: " + ", ".join(f"{key} {value}" for key, value in about.items()))
    if alpha is None and not need_plan:
        return None
    plan = AdaSkip().plan(profile, 1.2 if alpha is None else alpha)
    typer.echo(f"\nalpha {1.2 if alpha is None else alpha:g}: {plan}")
    return plan


def _show_graph(plan: SkipPlan, model: str | None) -> None:
    from .graph_text import excerpt, explain, tiny_llama

    if model is None:
        layers = len({s.layer for s in plan.sublayers})
        short, first = excerpt(plan)
        subject: Any = tiny_llama(min(layers, 2))
        if short is not plan:
            last = first + 1
            typer.echo(f"\nlayers {first} and {last} of the plan, on a Llama of two layers:")
        plan = short
    else:
        from ..model.load import load

        subject = load(model, "cpu").model
    for shown in explain(subject, plan):
        typer.echo(f"\n{shown.phase}, before:\n\n{shown.before}")
        typer.echo(f"\n{shown.phase}, after:\n\n{shown.after}")


def _read(path: Path) -> str:
    """A text file, or standard input for ``-``."""
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
