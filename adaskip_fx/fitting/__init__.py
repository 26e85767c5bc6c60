"""Fit what stands in for skipped sublayers, on the same captured graphs that will run."""

from .compensator import Compensator
from .fit import Fitter, Rung, fit
from .moments import Moments
from .refine import Descent, Refinement, refine
from .sample import Sample
from .solve import solve, unexplained

__all__ = [
    "Compensator",
    "Descent",
    "Fitter",
    "Moments",
    "Refinement",
    "Rung",
    "Sample",
    "fit",
    "refine",
    "solve",
    "unexplained",
]
