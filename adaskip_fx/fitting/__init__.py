"""Fit what stands in for skipped sublayers, on the same captured graphs that will run."""

from .distillation import Descent, Refinement, refine
from .fitter import Fitter
from .least_squares import solve, unexplained
from .rank_bound import LatencyBound
from .recipe import Recipe, fit
from .search_fits import Compensator
from .second_moments import Moments
from .session import Workshop
from .spec import Rung
from .weighted_sample import Sample

__all__ = [
    "Compensator",
    "Descent",
    "Fitter",
    "LatencyBound",
    "Moments",
    "Recipe",
    "Refinement",
    "Rung",
    "Sample",
    "Workshop",
    "fit",
    "refine",
    "solve",
    "unexplained",
]
