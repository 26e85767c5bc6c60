"""Fit the surrogates of skipped sublayers, on the same captured graphs that will run."""

from .choose_windows import WindowRecipe, choose_windows
from .distillation import DistillConfig, DistillLog, distill
from .fitter import Fitter
from .least_squares import solve, unexplained_variance
from .rank_bound import LatencyBound
from .recipe import Recipe, fit
from .search_fits import SurrogateFitter
from .second_moments import SecondMoments
from .session import FittingSession
from .spec import SurrogateSpec
from .weighted_sample import Sample

__all__ = [
    "DistillConfig",
    "DistillLog",
    "Fitter",
    "FittingSession",
    "LatencyBound",
    "Recipe",
    "Sample",
    "SecondMoments",
    "SurrogateFitter",
    "SurrogateSpec",
    "WindowRecipe",
    "choose_windows",
    "distill",
    "fit",
    "solve",
    "unexplained_variance",
]
