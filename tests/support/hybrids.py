"""A decoder whose layers keep keys and values, or states."""

from __future__ import annotations

import functools
from typing import Any

from adaskip_fx.api import build
from tests.support.families.all import tiny_config, tiny_model


@functools.cache
def hybrid() -> tuple[Any, Any]:
    """A model of layers with states and layers with keys and values, and the same compiled."""
    model = tiny_model(tiny_config("jamba"))
    return model, build(model, None, backend="eager", static_cache=False)
