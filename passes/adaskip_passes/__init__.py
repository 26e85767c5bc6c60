"""Cut a captured decoder into sublayers and link it again, without some of them.

The mechanism under ``adaskip_fx``; it needs torch alone. In order:

- :func:`capture` a function as one graph with Dynamo, to be run without it;
- :func:`canonicalize` how it adds to the residual stream;
- :func:`find_sublayers`: the residual branches of the graph;
- :func:`outline`: a small outer graph of calls to pieces, equal pieces sharing one key;
- :class:`Skip`, :class:`Probe`, :class:`Tap`: passes over the outer graph, run by
  :func:`run_passes`; each is a :class:`Pass`, and says in a :class:`PassResult` what it changed;
- :func:`link` the pieces that a :class:`PieceCompiler` compiles into a program, or :func:`fuse`
  them into one flat graph.

For a GPU's decode step: :class:`FuseProjections` gives its pieces operators that read every weight
once, and a :class:`Recorder` makes a program one CUDA graph.

The names in ``__all__`` are what somebody needs who writes a pass or a backend. They are imported
at their first use, so that ``from adaskip_passes.errors import AdaskipError`` imports no torch.
Everything else is imported from its submodule.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .analysis.residual_branches import find_sublayers
    from .decode.cuda_graphs import Recorder, Recording
    from .decode.fuse_projections import FuseProjections
    from .decode.fuse_rank_sums import FuseRankSums
    from .errors import AdaskipError, UnsupportedError
    from .infra.pass_base import Pass, PassResult
    from .infra.pass_manager import run_passes
    from .linking.link import fuse, link
    from .linking.piece_compiler import PieceCompiler
    from .normalize.canonicalize import canonicalize
    from .partition.outline import outline
    from .tracing.capture import capture
    from .transforms.probe import Probe
    from .transforms.skip import Replacement, Skip
    from .transforms.tap import Tap

__all__ = [
    "AdaskipError",
    "FuseProjections",
    "FuseRankSums",
    "Pass",
    "PassResult",
    "PieceCompiler",
    "Probe",
    "Recorder",
    "Recording",
    "Replacement",
    "Skip",
    "Tap",
    "UnsupportedError",
    "canonicalize",
    "capture",
    "find_sublayers",
    "fuse",
    "link",
    "outline",
    "run_passes",
]

_HOMES = MappingProxyType(
    {
        "AdaskipError": "errors",
        "FuseProjections": "decode.fuse_projections",
        "FuseRankSums": "decode.fuse_rank_sums",
        "Pass": "infra.pass_base",
        "PassResult": "infra.pass_base",
        "PieceCompiler": "linking.piece_compiler",
        "Probe": "transforms.probe",
        "Recorder": "decode.cuda_graphs",
        "Recording": "decode.cuda_graphs",
        "RefusedError": "errors",  # the name of UnsupportedError before 0.1.0
        "Replacement": "transforms.skip",
        "Skip": "transforms.skip",
        "Tap": "transforms.tap",
        "UnsupportedError": "errors",
        "canonicalize": "normalize.canonicalize",
        "capture": "tracing.capture",
        "find_sublayers": "analysis.residual_branches",
        "fuse": "linking.link",
        "link": "linking.link",
        "outline": "partition.outline",
        "run_passes": "infra.pass_manager",
    }
)


def __getattr__(name: str) -> object:
    """Return a public name, imported now.

    Raises:
        AttributeError: The package has no such name.
    """
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, and those that every module has."""
    return sorted({*globals(), *__all__})
