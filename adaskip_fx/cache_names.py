"""What a model and its outputs call a cache: by model, and since transformers 5.24 another name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

#: ``cache`` everywhere since 5.24; before, ``cache_params`` where there are only mixers (Mamba).
CACHE_NAMES = ("cache", "cache_params", "past_key_values")


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a model's forward calls its cache."""
    parameters = inspect.signature(forward).parameters
    return next((n for n in CACHE_NAMES if n in parameters), CACHE_NAMES[-1])


def output_fields(output: type[Any], cache: Any) -> dict[str, Any]:
    """The argument that hands a cache to an output class of transformers'."""
    fields = {field.name for field in dataclasses.fields(output)}
    return {next(n for n in CACHE_NAMES if n in fields): cache}


def under_one_name(given: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments of forward with the cache under `name`, whichever of the names it was given by.

    transformers takes the old name as well, by a decorator that a generated forward has not.
    """
    other = {n: given[n] for n in CACHE_NAMES if n != name and n in given}
    if not other:
        return given
    cache = next((c for c in (given.get(name), *other.values()) if c is not None), None)
    return {**{k: v for k, v in given.items() if k not in other}, name: cache}
