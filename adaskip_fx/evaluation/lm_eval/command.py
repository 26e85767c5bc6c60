"""``adaskip-lm-eval``: the command of lm-evaluation-harness, with the model ``adaskip``."""

from __future__ import annotations

import sys


def main() -> None:
    """Register the model, then do what ``lm_eval`` does with the same arguments."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        sys.exit("error: lm_eval is not installed. Run: pip install 'adaskip-fx[lm-eval]'")
    from . import model  # noqa: F401  # importing it registers the model

    cli_evaluate()
