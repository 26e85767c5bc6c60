"""``adaskip-fx doctor``: what is installed, where it would run, and whether a model can be used."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated

import typer

from .options import MODEL, AsJson, Debug, Device, Dtype
from .reporting import print_json, reported

_PACKAGE = "adaskip-fx"
_SHOWN = ("torch", "transformers", "numpy", "safetensors", "triton")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        ok: whether models can be compiled as far as this goes.
        text: what was found, and what to do where it is not ok.
    """

    name: str
    ok: bool
    text: str


def doctor(
    model: Annotated[str | None, typer.Argument(help=f"A model to try. {MODEL}")] = None,
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what is installed, where it would run, and whether a model can be compiled.

    The exit status is 0 where all is well and 1 where something is in the way.
    """
    with reported(debug):
        found = [*versions(metadata_of()), *machine(device)]
        if model is not None:
            found.append(captured(model, device, dtype))
    if as_json:
        ok = all(finding.ok for finding in found)
        print_json({"ok": ok, "findings": [asdict(f) for f in found]})
    else:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            mark = "ok " if finding.ok else "NOT"
            typer.echo(f"{mark} {finding.name:<{width}}  {finding.text}")
    if not all(finding.ok for finding in found):
        raise typer.Exit(1)


def metadata_of() -> tuple[str, ...]:
    """Return the requirements of this package; none where it runs from a clone."""
    try:
        return tuple(metadata.requires(_PACKAGE) or ())
    except metadata.PackageNotFoundError:
        return ()


def versions(requirements: Sequence[str]) -> Iterator[Finding]:
    """Say which versions are installed, and whether they are among those that are supported.

    Args:
        requirements: as in a package's metadata: ``torch<2.15,>=2.11``.
    """
    from packaging.requirements import Requirement

    wanted = {r.name: r.specifier for r in map(Requirement, requirements) if r.marker is None}
    yield Finding("python", True, platform.python_version())
    for name in _SHOWN:
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in wanted:
                yield Finding(name, False, f"not installed; needed is {name}{wanted[name]}")
            continue
        specifier = wanted.get(name)
        if specifier is None or specifier.contains(installed, prereleases=True):
            yield Finding(name, True, installed)
        else:
            text = f"{installed}; supported is {specifier}: pip install '{name}{specifier}'"
            yield Finding(name, False, text)


def machine(device: str) -> Iterator[Finding]:
    """Say where models would run, and what would compile them.

    Raises:
        ValueError: the device is not there.
    """
    import torch

    from ..model.load import choose_device, usable_backend
    from ..utils.torch_internals import find_cpp_compiler

    chosen = choose_device(device)
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        memory = properties.total_memory / 2**30
        yield Finding("device", True, f"{properties.name}, {memory:.0f} GiB")
    else:
        yield Finding("device", True, f"{chosen}, {torch.get_num_threads()} threads")
    _, why = usable_backend("inductor", chosen)
    compiler = find_cpp_compiler() if chosen.type == "cpu" else "Triton"
    yield Finding("compiler", why is None, why or str(compiler))


def captured(name: str, device: str, dtype: str | None) -> Finding:
    """Say whether a model can be captured and cut into sublayers; nothing is compiled for it.

    Raises:
        FileNotFoundError, ValueError: it cannot be loaded.
    """
    from adaskip_passes import UnsupportedError

    from ..api import build
    from ..model.check_model import check_model
    from ..model.load import load
    from ..plans.tables import by_kind

    loaded = load(name, device, dtype)
    try:
        check_model(loaded.model)
        compiled = build(loaded.model, None, backend="eager")
    except (UnsupportedError, NotImplementedError, TypeError, ValueError) as error:
        return Finding(loaded.name, False, str(error))
    sublayers = compiled.adaskip.sublayers
    about = f"{type(loaded.model).__name__}, {len(sublayers)} sublayers: {by_kind(sublayers)}"
    return Finding(loaded.name, True, about)
