"""Fit what stands in for skipped sublayers, on the same captured graphs that will run."""

from .bound import LatencyBound
from .compensator import Compensator
from .fitter import Fitter
from .moments import Moments
from .recipe import Recipe, fit
from .refine import Descent, Refinement, refine
from .rung import Rung
from .sample import Sample
from .solve import solve, unexplained
from .workshop import Workshop

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
