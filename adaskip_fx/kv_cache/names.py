"""What a model and its outputs call a cache: by model, and since transformers 5.24 another name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin

#: ``cache`` everywhere since 5.24; before, ``cache_params`` where there are only mixers (Mamba).
CACHE_NAMES = ("cache", "cache_params", "past_key_values")


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a model's forward calls its cache."""
    parameters = inspect.signature(forward).parameters
    return next((n for n in CACHE_NAMES if n in parameters), CACHE_NAMES[-1])


def generate_argument(forward: Callable[..., Any]) -> str:
    """What ``generate`` calls the cache among the arguments that it keeps for `forward`.

    Since 5.24 that is ``cache`` for every model, also for one of a user's own whose forward still
    has the old name.
    """
    prepares = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return CACHE_NAMES[0] if CACHE_NAMES[0] in prepares else cache_argument(forward)


def output_fields(output: type[Any], cache: Any) -> dict[str, Any]:
    """The argument that hands a cache to an output class of transformers'."""
    return {_field_of(output): cache}


def cache_of(output: Any) -> Any:
    """The cache that an output of a model or of ``generate`` holds, or None."""
    return getattr(output, _field_of(type(output)))


def _field_of(output: type[Any]) -> str:
    fields = {field.name for field in dataclasses.fields(output)}
    return next(n for n in CACHE_NAMES if n in fields)


def under_one_name(given: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments of forward with the cache under `name`, whichever of the names it was given by.

    transformers takes the old name as well, by a decorator that a generated forward has not.

    Raises:
        ValueError: two names were given, and two caches.
    """
    names = [n for n in CACHE_NAMES if n in given]
    if names in ([], [name]):
        return given
    caches = {n: given[n] for n in names if given[n] is not None}
    cache = next(iter(caches.values()), None)
    if any(c is not cache for c in caches.values()):
        raise ValueError(f"{' and '.join(caches)} are two names for one cache; give one of them")
    return {**{k: v for k, v in given.items() if k not in names}, name: cache}
