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

from .analysis.effects import written
from .analysis.residual_branches import ResidualBranch, find_sublayers
from .capture.capture import Binder, Capture, ShapeGuards, capture, describe
from .capture.dynamo import one_at_a_time
from .capture.python_state import Change, PythonState, describe_tensor, sharing
from .capture.reads import Reads, readable
from .capture.repeated_layers.mark import Repeat
from .capture.repeated_layers.match import LayerIndex, layer_index
from .decode.cuda_graphs import Recorder
from .decode.fuse_projections import FuseProjections
from .decode.ops import attend, project
from .errors import AdaskipError, UnsupportedError
from .link.link import fuse, link
from .link.piece_compiler import PieceCompiler, start_workers
from .normalize.canonicalize import canonicalize
from .normalize.serialize_branches import separate
from .normalize.unflatten import unflatten
from .partition.outline import Piece, outline, piece_of, sublayer_calls
from .transforms.dead_code import eliminate_dead_code
from .transforms.drop_cache_writes import differentiable
from .transforms.pass_manager import Pass, run_passes, text
from .transforms.probe import PROBE_STATS, VALID, Probe, ProbeLayers
from .transforms.skip import Keep, Replacement, Skip, surrogate_inputs
from .transforms.surrogates import SURROGATES
from .transforms.tap import Tap

__all__ = [
    "PROBE_STATS",
    "SURROGATES",
    "VALID",
    "AdaskipError",
    "Binder",
    "Capture",
    "Change",
    "FuseProjections",
    "Keep",
    "LayerIndex",
    "Pass",
    "Piece",
    "PieceCompiler",
    "Probe",
    "ProbeLayers",
    "PythonState",
    "Reads",
    "Recorder",
    "Repeat",
    "Replacement",
    "ResidualBranch",
    "ShapeGuards",
    "Skip",
    "Tap",
    "UnsupportedError",
    "attend",
    "canonicalize",
    "capture",
    "describe",
    "describe_tensor",
    "differentiable",
    "eliminate_dead_code",
    "find_sublayers",
    "fuse",
    "layer_index",
    "link",
    "one_at_a_time",
    "outline",
    "piece_of",
    "project",
    "readable",
    "run_passes",
    "separate",
    "sharing",
    "start_workers",
    "sublayer_calls",
    "surrogate_inputs",
    "text",
    "unflatten",
    "written",
]
