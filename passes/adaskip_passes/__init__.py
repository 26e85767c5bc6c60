"""Cut a captured decoder into sublayers and link it again, without some of them.

The mechanism under ``adaskip_fx``; it needs torch alone. In order:

- :func:`capture` a function as one graph with Dynamo, to be run without it;
- :func:`canonicalize` how it adds to the residual stream;
- :func:`find_sublayers`: the residual branches of the graph;
- :func:`outline`: a small outer graph of calls to pieces, equal pieces sharing one key;
- :class:`Skip`, :class:`Probe`, :class:`ProbeLayers`, :class:`Tap`: passes over the outer graph,
  run by :func:`run_passes`;
- :func:`link` compiled pieces into a program, or :func:`fuse` them into one flat graph.

For a GPU's decode step: :class:`FuseProjections` gives its pieces operators that read every weight
once, and a :class:`Recorder` makes a program one CUDA graph.
"""

from .canonical import canonicalize
from .capture import Binder, Capture, ShapeGuards, capture, describe
from .compensation import STAND_INS
from .compiler import PieceCompiler, start_workers
from .cuda_graphs import Recorder
from .dead_code import eliminate_dead_code
from .decode_ops import attend, project
from .differentiable import differentiable
from .dynamo import one_at_a_time
from .errors import RefusedError
from .flattened import unflatten
from .link import fuse, link
from .outline import Piece, outline, piece_of, sublayer_calls
from .parallel import separate
from .pipeline import Pass, run_passes, text
from .probe import MOMENTS, VALID, Probe, ProbeLayers
from .projections import FuseProjections
from .python_state import Change, PythonState, describe_tensor, sharing
from .reads import Reads, readable
from .repeats import Repeat
from .skip import Keep, Replacement, Skip, stand_in_inputs
from .sublayers import Sublayer, find_sublayers
from .tap import Tap
from .twins import Place, place_of

__all__ = [
    "MOMENTS",
    "STAND_INS",
    "VALID",
    "Binder",
    "Capture",
    "Change",
    "FuseProjections",
    "Keep",
    "Pass",
    "Piece",
    "PieceCompiler",
    "Place",
    "Probe",
    "ProbeLayers",
    "PythonState",
    "Reads",
    "Recorder",
    "RefusedError",
    "Repeat",
    "Replacement",
    "ShapeGuards",
    "Skip",
    "Sublayer",
    "Tap",
    "attend",
    "canonicalize",
    "capture",
    "describe",
    "describe_tensor",
    "differentiable",
    "eliminate_dead_code",
    "find_sublayers",
    "fuse",
    "link",
    "one_at_a_time",
    "outline",
    "piece_of",
    "place_of",
    "project",
    "readable",
    "run_passes",
    "separate",
    "sharing",
    "stand_in_inputs",
    "start_workers",
    "sublayer_calls",
    "text",
    "unflatten",
]
