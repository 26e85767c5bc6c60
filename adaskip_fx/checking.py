"""``ADASKIP_CHECK=1``: look at every step whether it is right, at whatever cost."""

from __future__ import annotations

import os


def checks() -> bool:
    """Whether the environment asks for it, now."""
    return os.environ.get("ADASKIP_CHECK", "") not in ("", "0")
