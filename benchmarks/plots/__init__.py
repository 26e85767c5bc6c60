"""Pictures of profiles, plans and results: ``python -m benchmarks plot KIND FILE... --out DIR``.

A kind is a module that says what it is drawn from (`HOW`) and draws it (`figure`). Files are read
to plain data first; matplotlib (the extra ``plot``) is imported when something is drawn.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from .source import load
from .style import PlotError, drawing, write

__all__ = ["KINDS", "PlotError", "plot"]

#: kind -> the module that draws it
KINDS = MappingProxyType(
    {
        "similarity": "similarity",
        "pareto": "pareto",
        "plans": "plan_map",
        "growth": "growth",
        "matrix": "matrix",
        "window": "window",
        "heads": "head_map",
        "shares": "shares",
    }
)


def plot(kind: str, files: Sequence[Path], out: Path, name: str | None = None) -> list[Path]:
    """Draw one picture of some files; returns the SVG and the PNG that were written.

    Args:
        kind: one of `KINDS`.
        files: results, profiles' folders or plan files; all go into one picture.
        out: folder, made if need be.
        name: of the picture's files, without extension; the kind's when None.

    Raises:
        PlotError: an unknown kind, a file without what the kind is drawn from, no matplotlib.
    """
    if kind not in KINDS:
        raise PlotError(f"unknown picture {kind!r}; there are {', '.join(KINDS)}")
    documents = [load(Path(file)) for file in files]
    with drawing() as make:
        module = importlib.import_module(f".{KINDS[kind]}", __name__)
        return write(module.figure(documents, make), out, name or kind)
