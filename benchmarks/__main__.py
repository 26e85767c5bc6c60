"""``python -m benchmarks run NAME [NAME ...]`` measures, prints and writes ``results/NAME.json``.

Names that begin with ``study_`` are studies of the method on a real model, which take options for
the model and the texts, and draw pictures beside the JSON.

``python -m benchmarks studies`` says what their results hold and draws them again;
``python -m benchmarks report`` prints what the others hold as Markdown tables, with pictures,
``python -m benchmarks tradeoff`` quality against speed;
``python -m benchmarks plot KIND FILE...`` draws profiles, plans or results.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import report as reports
from . import report_pictures, tradeoff
from .plots import KINDS, PlotError, plot
from .studies import STUDIES

#: name -> the module that measures it; imported when it runs, since `report` needs no torch
WORKLOADS = {
    name: {"speed_batch8": "speed", "peers_whole_graph": "peers"}.get(name, name)
    for name in (
        *("link", "speed", "speed_batch8", "plans", "window", "generate", "peers"),
        *("peers_whole_graph", "cold", "budget", "states", "windows", "imports", "situations"),
        *("tensor_parallel", "lossless", "cpu"),
    )
} | {"vllm": "vllm_serving"}
RESULTS = Path(__file__).parent / "results"
#: Of several processes the first one writes.
_WRITES = os.environ.get("RANK", "0") == "0"

app = typer.Typer(add_completion=False, help=__doc__)


@app.callback()
def main() -> None:
    """Measurements of adaskip_fx."""


@app.command()
def run(
    workloads: Annotated[
        list[str], typer.Argument(metavar="NAME", help=", ".join([*WORKLOADS, *STUDIES]))
    ],
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = RESULTS,
    model: Annotated[
        str | None,
        typer.Option(help="of studies and lossless", show_default="SmolLM2-135M-Instruct"),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="another text for studies")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="folder: each *.txt is a text")] = None,
    only: Annotated[list[str] | None, typer.Option(help="texts, situations, parts; all")] = None,
    calibrate: Annotated[
        list[str] | None, typer.Option(help="texts that study_recipe calibrates on; two of all")
    ] = None,
    device: Annotated[str, typer.Option(help="of studies: auto, cpu or cuda")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="of studies")] = None,
    backend: Annotated[str | None, typer.Option(help="of studies")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="windows of a text's half")] = None,
    length: Annotated[int | None, typer.Option(min=16, help="tokens of a window")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="of studies; may be repeated")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="of study_pareto; ways of study_windows; all")
    ] = None,
    surrogate: Annotated[list[str] | None, typer.Option(help="of studies")] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="saved, for study_pareto, _summaries, _windows, _kv_cache, _window_stand_ins",
        ),
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="folder for found plans")] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, help="of refinement: study_recipe, each alpha; _window_stand_ins"),
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="sublayers study_errors goes up to")] = 16,
    seed: Annotated[int, typer.Option(help="of studies")] = 0,
    label: Annotated[str, typer.Option(help="after the names of the results: NAME-LABEL")] = "",
) -> None:
    """Measure workloads, one after another in this process, so that they share the model."""
    known = {**WORKLOADS, **STUDIES}
    for name in workloads:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(sorted(known))}")
    _check_situations(workloads, only or ())
    texts = [(path.stem, path) for path in sorted(data.glob("*.txt"))] if data else []
    texts += _files("--text", text or ())
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    given = {
        **{"model": model, "texts": tuple(texts), "only": tuple(only or ())},
        **{"plans": _files("--plan", plan or ()), "keep": keep},
        "calibrate": tuple(calibrate or ()),
        **{"device": device, "dtype": dtype, "backend": backend},
        **{"samples": samples, "length": length, "most": most, "seed": seed},
        **({"alphas": tuple(alpha)} if alpha else {}),
        "steps": tuple(steps or ()),
        **{"policies": tuple(policy or ()), "surrogates": tuple(surrogate or ())},
    }
    out.mkdir(parents=True, exist_ok=True)
    for name in workloads:
        module = importlib.import_module(f"benchmarks.{known[name]}")
        file = out / f"{name}{f'-{label}' if label else ''}.json"
        result = _document(name, module, given, file)
        if not _WRITES:
            continue
        text_ = _write(file, result)
        typer.echo(f"{name}:\n{module.summary(result)}" if hasattr(module, "summary") else text_)
        if name in STUDIES:
            _draw(file, module, out)
    if "tensor_parallel" in workloads:
        importlib.import_module("benchmarks.tensor_parallel.processes").leave()


def _check_situations(workloads: Sequence[str], only: Sequence[str]) -> None:
    """What `--only` names must be there, before minutes go by without it."""
    known: list[str] = []
    if "situations" in workloads:
        from .situations import SITUATIONS

        known += SITUATIONS
    if "tensor_parallel" in workloads:
        from .tensor_parallel.subject import SHAPES

        known += SHAPES
    for name in only if known else ():
        if name not in known:
            raise typer.BadParameter(f"--only {name!r} is none of {', '.join(known)}")


def _files(option: str, named: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """(name, file) of each NAME=PATH."""
    found = []
    for item in named:
        name, separator, path = item.partition("=")
        if not (name and separator and path):
            raise typer.BadParameter(f"{option} {item!r}: write NAME=PATH")
        if not Path(path).is_file():
            raise typer.BadParameter(f"{path}: no such file")
        found.append((name, Path(path)))
    return tuple(found)


def _draw(result: Path, module: Any, out: Path) -> None:
    """A study's pictures, of its result; none without matplotlib."""
    for kind in module.PICTURES:
        title = result.stem if kind == module.PICTURES[0] else f"{result.stem}_{kind}"
        try:
            paths = plot(kind, [result], out, title)
        except PlotError as error:
            typer.echo(f"no picture: {error}", err=True)
            return
        typer.echo(f"wrote {', '.join(map(str, paths))}", err=True)


@app.command()
def studies(
    results: Annotated[Path, typer.Option(help="folder with the JSON")] = RESULTS,
    out: Annotated[Path | None, typer.Option(help="folder for the pictures; the same")] = None,
) -> None:
    """Say in words what the studies found whose results are there, and draw them again."""
    found = [
        (name, path)
        for name in STUDIES
        for path in (results / f"{name}.json", *sorted(results.glob(f"{name}-*.json")))
        if path.is_file()
    ]
    if not found:
        typer.echo(
            f"error: no study in {results}: `run {next(iter(STUDIES))}` writes one", err=True
        )
        raise typer.Exit(1)
    for name, path in found:
        module = importlib.import_module(f"benchmarks.{STUDIES[name]}")
        result = json.loads(path.read_text())
        at = result["conditions"]
        where = f"{at['device']}, torch {at['torch']}, transformers {at['transformers']}"
        typer.echo(f"{path.stem}: {where}\n{module.summary(result)}\n")
        _draw(path, module, out or results)


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="folder with the JSON")] = RESULTS,
    out: Annotated[
        Path | None, typer.Option(help="folder for speed.svg and speed.png; that of the JSON")
    ] = None,
) -> None:
    """Print the results as Markdown tables, and draw them where matplotlib is installed."""
    try:
        documents = reports.load(results)
        typer.echo(reports.tables(documents))
    except reports.ReportError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    try:
        drawn = report_pictures.draw(documents, out or results)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        typer.echo("plots left out: matplotlib is not installed", err=True)
    else:
        for path in drawn:
            typer.echo(f"wrote {path}", err=True)


app.command("tradeoff")(tradeoff.command)


@app.command("plot")
def draw(
    kind: Annotated[str, typer.Argument(help=", ".join(KINDS))],
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="results, profiles or plans, all in one picture"),
    ],
    out: Annotated[Path, typer.Option(help="folder for the SVG and the PNG")] = Path("."),
    name: Annotated[
        str | None, typer.Option(help="name of the files", show_default="the kind's")
    ] = None,
) -> None:
    """Draw profiles, plans or results, as SVG and PNG."""
    try:
        paths = plot(kind, files, out, name)
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    for path in paths:
        typer.echo(f"wrote {path}")


def _write(file: Path, document: dict[str, Any]) -> str:
    """Write a result, and return its text."""
    text = json.dumps(document, indent=1)
    file.write_text(text + "\n")
    return text


def _document(name: str, module: Any, given: dict[str, Any], file: Path) -> dict[str, Any]:
    """One workload's result with its conditions; a thread count it sets ends with it.

    Some that take long are saved to the file as far as they are.
    """
    import torch

    from .conditions import conditions

    def save(part: dict[str, Any]) -> None:
        if _WRITES:
            _write(file, {"workload": name, **part, "conditions": conditions()})

    def earlier() -> dict[str, Any] | None:
        return json.loads(file.read_text()) if file.is_file() else None

    threads = torch.get_num_threads()
    try:
        measured = _measure(name, module, {**given, "save": save, "earlier": earlier})
        return {"workload": name, **measured, "conditions": conditions()}
    finally:
        torch.set_num_threads(threads)


def _measure(name: str, module: Any, given: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any]
    if name in STUDIES:
        from .studies.setup import Options

        result = module.measure(Options(**given))
    elif name == "speed_batch8":
        on_gpu = module.models.device().type == "cuda"
        result = module.measure(batch=8, contexts=(8192,) if on_gpu else None)
    elif name == "peers_whole_graph":
        result = module.measure(whole_graph=True)
    elif name == "situations":
        only = given["only"]
        result = module.measure(only, given["earlier"]() if only else None, given["save"])
    elif name == "tensor_parallel":
        result = module.measure(only=given["only"])
    elif name == "lossless":
        result = module.measure(only=given["only"], model=given["model"])
    else:
        result = module.measure()
    return result


if __name__ == "__main__":
    app()
