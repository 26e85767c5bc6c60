"""``adaskip-fx demo``: AdaSkip on a real model, from calibration to what it did to the answers."""

from .result import DemoResult, Options
from .run import make_texts, run_demo
from .show import show

__all__ = ["DemoResult", "Options", "make_texts", "run_demo", "show"]
