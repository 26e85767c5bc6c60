"""Tiny models of families, each compiled once in a process, for tests that leave them alone."""

from __future__ import annotations

import functools
from typing import Any

from adaskip_fx.api import build
from tests.support.families.all import tiny_config, tiny_model


@functools.cache
def compiled_family(name: str) -> tuple[Any, Any]:
    """A model, and the same compiled with the eager inner backend."""
    model = tiny_model(tiny_config(name))
    return model, build(model, None, backend="eager")
