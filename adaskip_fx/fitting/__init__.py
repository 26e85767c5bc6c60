"""Fit what stands in for skipped sublayers, on the same captured graphs that will run."""

from .fit import Fitter, Rung, fit
from .moments import Moments
from .solve import solve, unexplained

__all__ = ["Fitter", "Moments", "Rung", "fit", "solve", "unexplained"]
