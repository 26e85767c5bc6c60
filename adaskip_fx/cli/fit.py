"""``adaskip-fx fit``: from texts to a plan whose skipped sublayers lose the least."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import Alpha, AsJson, Backend, Debug, Device, Dtype, Model, ProfileFolder
from .reporting import print_json, reported

if TYPE_CHECKING:
    from ..fitting import LatencyBound, Recipe
    from ..plans.skip_plan import SkipPlan
    from ..profiles.profile import Profile
    from ..utils.progress import Steps

Phases = Literal["both", "prefill", "decode"]
#: As `adaskip_fx.plans.surrogate.SurrogateKind`, which would import numpy.
SurrogateName = Literal["scale", "diagonal", "low_rank", "linear", "normalized"]


Out = Annotated[Path, typer.Argument(help="File to write the plan to (JSON).")]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH",
        help="A UTF-8 text of one kind (prose, code, ...); may be repeated.",
        show_default="the Python reference in pydoc_data.topics",
    ),
]
Kind = Annotated[SurrogateName, typer.Option(help="What stands in for a sublayer.")]
Rank = Annotated[
    int | None, typer.Option(min=1, help="Rank of low_rank; chosen on unseen texts if not given.")
]
Within = Annotated[
    float | None,
    typer.Option(help="Choose no rank that takes more than this share of a sublayer's time."),
]
TableFile = Annotated[
    Path | None, typer.Option(help="For --within: file that measure --ranks wrote.")
]
Context = Annotated[int | None, typer.Option(help="For --within: tokens of a typical request.")]
BoundPhase = Annotated[
    Phases | None, typer.Option(help="For --within: where it holds.", show_default="both")
]
Search = Annotated[
    bool, typer.Option(help="Choose sublayers by what is lost, or by AdaSkip's similarity.")
]
InOrder = Annotated[
    bool,
    typer.Option(
        "--in-order/--at-once",
        help="Fit surrogates in the order of the plan, or all in one pass over the texts.",
    ),
]
OwnSamples = Annotated[
    int, typer.Option(min=0, help="Samples that the model writes itself, to fit on as well.")
]
RefinementSteps = Annotated[int, typer.Option(min=0, help="Steps of gradient descent.")]
MaxLength = Annotated[int, typer.Option(min=64, help="Tokens of a text at most.")]
Samples = Annotated[int, typer.Option(min=2, help="Texts of each kind at most.")]
Seed = Annotated[int, typer.Option(help="Seeds all that is drawn.")]


def fit(
    model: Model,
    profile: ProfileFolder,
    out: Out,
    text: Texts = None,
    alpha: Alpha = 1.2,
    kind: Kind = "normalized",
    rank: Rank = None,
    within: Within = None,
    table: TableFile = None,
    context: Context = None,
    phase: BoundPhase = None,
    search: Search = True,
    in_order: InOrder = True,
    own: OwnSamples = 64,
    steps: RefinementSteps = 300,
    max_length: MaxLength = 2048,
    samples: Samples = 16,
    seed: Seed = 0,
    backend: Backend = "eager",
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Choose what to skip by what is lost, fit what stands in for it, and save the plan."""
    bound_given = (within, table, context, phase)
    _check_bound(*bound_given)
    files = text_files(text)
    with reported(debug) as report:
        from ..fitting import Recipe, SurrogateSpec
        from ..profiles.profile import Profile
        from ..utils.files import check_file_target
        from .json_views import decision_json

        check_file_target(out, "a plan")  # before minutes of work
        bound = _bound(*bound_given)
        spec = SurrogateSpec(kind, rank, bound=bound)
        recipe = Recipe(search, spec, own, max_length, steps, seed=seed, in_order=in_order)
        plan = _fitted(
            (model, device, dtype, backend),
            read_texts(files, max_length, samples),
            Profile.load(profile),
            alpha,
            recipe,
            bound,
            report,
        )
        plan.save(out)
        if as_json:
            print_json({"saved_to": str(out), **decision_json(plan)})
        else:
            typer.echo(str(plan))
        report.say(f"saved to {out}")


def _fitted(
    subject: tuple[str, str, str | None, str],
    texts: dict[str, list[str]],
    profile: Profile,
    alpha: float,
    recipe: Recipe,
    bound: LatencyBound | None,
    report: Steps,
) -> SkipPlan:
    """Load the model, given by name, device, dtype and backend, and fit a plan for it."""
    from ..fitting import fit as learn
    from .subject import loaded_model

    name, device, dtype, backend = subject
    loaded = loaded_model(name, device, dtype, report)
    profile.check(loaded.model)
    if bound is not None:
        bound.table.check(loaded.model)
        if bound.table.warning:
            report.say(bound.table.warning)
    options: dict[str, Any] = {"backend": backend, "say": report.say}
    with report.step("fit"):
        return learn(loaded.model, loaded.tokenizer, texts, profile, alpha, recipe, **options)


def _check_bound(
    within: float | None, table: Path | None, context: int | None, phase: Phases | None
) -> None:
    """Refuse options of a bound that do not go together."""
    given = (within, table, context)
    if any(v is None for v in given) and any(v is not None for v in (*given, phase)):
        raise typer.BadParameter(
            "--within, --table and --context go together: a share of a sublayer's time, the file "
            "that adaskip-fx measure --ranks wrote, and the tokens of a typical request"
        )


def _bound(
    within: float | None, table: Path | None, context: int | None, phase: Phases | None
) -> LatencyBound | None:
    """Return what --within says; None without it.

    Raises:
        ValueError: a table that cannot be read or has no ranks, or where none fits.
    """
    if within is None or table is None or context is None:
        return None
    from ..fitting import LatencyBound
    from ..latency.table import LatencyTable

    return LatencyBound(LatencyTable.load(table), context, within, phase or "both")


def text_files(options: list[str] | None) -> dict[str, Path]:
    """Return the file of each kind of text, from NAME=PATH."""
    files: dict[str, Path] = {}
    for item in options or []:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(
                f"--text {item}: write NAME=PATH, for example --text prose=book.txt"
            )
        if name in files:
            raise typer.BadParameter(f"--text {item}: {name} was given before; name each kind once")
        files[name] = Path(path)
    return files


def read_texts(files: dict[str, Path], max_length: int, samples: int) -> dict[str, list[str]]:
    """Return the samples of each kind; without files of the Python reference's calibration half."""
    from ..data.reference_text import calibration_samples
    from ..utils.files import read_text

    if not files:
        return {"pydoc": calibration_samples(None, max_length, samples)}
    return {
        name: calibration_samples([read_text(path)], max_length, samples)
        for name, path in files.items()
    }
