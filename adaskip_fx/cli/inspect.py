"""``adaskip-fx inspect``: show a file that another command wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import MODEL, AsJson, Debug, TimedContext
from .reporting import print_json, reported

if TYPE_CHECKING:
    from ..plans.skip_plan import SkipPlan
    from ..profiles.profile import Profile
    from .graph_text import Explained

_ALPHA = 1.2


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A profile's or decision's folder, or the file of a plan or a latency table."
        ),
    ],
    alpha: Annotated[
        float | None,
        typer.Option(
            min=1, help="Show what a profile would skip at this ratio.", show_default="1.2"
        ),
    ] = None,
    context: TimedContext = None,
    table: Annotated[
        Path | None, typer.Option(help="File that measure wrote, for --context.")
    ] = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="Show the outer graph before and after.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help=MODEL, show_default="two layers of a tiny Llama")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show a profile, a decision or a latency table, and what a plan does to a graph."""
    if path.is_file() and alpha is not None:
        raise typer.BadParameter("a plan is made for one alpha already; --alpha is for profiles")
    if (context is None) != (table is None) or (path.is_file() and table is not None):
        raise typer.BadParameter("--context and --table go together, with a profile")
    with reported(debug):
        timed = None if table is None or context is None else (table, context)
        lines, fields, plan = _read(path, alpha, timed, need_plan=graph)
        graphs: list[Explained] = []
        if graph and plan is not None:
            note, graphs = _graphs(plan, model)
            lines += [note] if note else []
            lines += [text for shown in graphs for text in _graph_lines(shown)]
        if as_json:
            described = [{"phase": g.phase, "before": g.before, "after": g.after} for g in graphs]
            print_json({**fields, **({"graphs": described} if graph else {})})
        else:
            typer.echo("\n".join(lines))


def _read(
    path: Path, alpha: float | None, timed: tuple[Path, int] | None, need_plan: bool
) -> tuple[list[str], dict[str, Any], SkipPlan | None]:
    """Read what is at `path`: as text, as JSON, and the plan that it holds or leads to."""
    from ..latency.table import LatencyTable, is_table
    from ..plans.decision_files import DOCUMENT, load_decision
    from ..plans.skip_plan import SkipPlan
    from ..profiles.profile import Profile
    from .json_views import decision_json

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / DOCUMENT).is_file():
        if alpha is not None or timed is not None or need_plan:
            raise ValueError(f"{path}: holds several plans; name one of its plan files instead")
        decision = load_decision(path)
        return [str(decision)], decision_json(decision), None
    if is_table(path):
        if need_plan:
            raise ValueError(f"{path}: a latency table has no graph; --graph is for plans")
        table = LatencyTable.load(path)
        return [str(table)], {"kind": "latency table", **json.loads(path.read_text("utf-8"))}, None
    if path.is_file():
        plan = SkipPlan.load(path)
        return [str(plan)], decision_json(plan), plan
    return _read_profile(Profile.load(path), alpha, timed, need_plan)


def _read_profile(
    profile: Profile, alpha: float | None, timed: tuple[Path, int] | None, need_plan: bool
) -> tuple[list[str], dict[str, Any], SkipPlan | None]:
    from ..latency.table import LatencyTable
    from ..policies import AdaSkip, TimedBySimilarity
    from .json_views import decision_json, profile_json

    measured = {**profile.calibration, **profile.versions}
    described = ", ".join(f"{key} {value}" for key, value in measured.items())
    lines = [str(profile), f"model: {profile.fingerprint}", f"measured: {described}"]
    fields = profile_json(profile)
    if alpha is None and timed is None and not need_plan:
        return lines, fields, None
    ratio = _ALPHA if alpha is None else alpha
    said = ""
    if timed is None:
        plan = AdaSkip().plan(profile, ratio)
    else:
        policy = TimedBySimilarity(LatencyTable.load(timed[0]), timed[1])
        plan = policy.plan(profile, ratio)
        said = f"\n{policy.describe(plan, profile)}"
    lines.append(f"\nalpha {ratio:g}: {plan}{said}")
    return lines, {**fields, "alpha": ratio, "plan": decision_json(plan)}, plan


def _graphs(plan: SkipPlan, model: str | None) -> tuple[str, list[Explained]]:
    """Return a note on what is shown, if it is an excerpt, and each phase's graph."""
    from .graph_text import excerpt, explain, tiny_llama

    if model is not None:
        from ..model.load import load

        return "", list(explain(load(model, "cpu").model, plan))
    layers = len({s.layer for s in plan.sublayers})
    short, first = excerpt(plan)
    note = ""
    if short is not plan:
        note = f"\nlayers {first} and {first + 1} of the plan, on a Llama of two layers:"
    return note, list(explain(tiny_llama(min(layers, 2)), short))


def _graph_lines(shown: Explained) -> tuple[str, str]:
    return (
        f"\n{shown.phase}, before:\n\n{shown.before}",
        f"\n{shown.phase}, after:\n\n{shown.after}",
    )
