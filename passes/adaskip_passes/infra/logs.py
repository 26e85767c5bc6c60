"""Where this package writes what it does: Python's ``logging``, and torch's structured trace.

``TORCH_LOGS="+adaskip_fx"`` shows everything, ``TORCH_LOGS="adaskip_fx"`` events alone:

- INFO: an event with the time it took (captured, outlined, compiled, linked);
- DEBUG: for each pass what it changed, the graph before and after it, and the diff.

torch reads ``TORCH_LOGS`` while it is imported, and takes the name of any module that it finds
(2.11 to 2.13); an alias or an artifact that a package registers later comes too late, and is
refused as unknown. So the loggers of this package lie below ``adaskip_fx``, which is one
distribution with it, as ``adaskip_fx.passes.<module>``: one name switches both packages on.

Under ``TORCH_TRACE`` the graphs also go to ``tlparse``, as artifacts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from .. import _torch

ROOT = "adaskip_fx.passes"


def logger_of(module: str) -> logging.Logger:
    """Return the logger of a module of this package, given its ``__name__``."""
    return logging.getLogger(module.replace("adaskip_passes", ROOT, 1))


def is_traced() -> bool:
    """Return whether torch's structured trace has a reader."""
    return _torch.is_traced()


def trace_text(name: str, text: Callable[[], str]) -> None:
    """Put a text into torch's structured trace.

    Args:
        name: Of the artifact, as ``tlparse`` shows it.
        text: Makes the text; not called where nobody reads the trace.
    """
    _torch.trace_artifact(f"adaskip_{name}", text)
