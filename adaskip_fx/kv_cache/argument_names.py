"""The name that a model and its outputs have for a cache; transformers 5.24 changed it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin

#: ``cache`` everywhere since 5.24; before, ``cache_params`` where there are only mixers (Mamba).
CACHE_NAMES = ("cache", "cache_params", "past_key_values")


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name of the cache among the parameters of a model's forward."""
    parameters = inspect.signature(forward).parameters
    return next((n for n in CACHE_NAMES if n in parameters), CACHE_NAMES[-1])


def generate_argument(forward: Callable[..., Any]) -> str:
    """Return the name of the cache among the arguments that ``generate`` keeps for `forward`.

    Since 5.24 that is ``cache`` for every model, also for one of a user's own whose forward still
    has the old name.
    """
    prepares = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return CACHE_NAMES[0] if CACHE_NAMES[0] in prepares else cache_argument(forward)


def output_fields(output: type[Any], cache: Any) -> dict[str, Any]:
    """Return a cache as the keyword argument that an output class of transformers' has for it."""
    return {_field_of(output): cache}


def cache_of(output: Any) -> Any:
    """Return the cache that an output of a model or of ``generate`` holds, or None."""
    return getattr(output, _field_of(type(output)))


def _field_of(output: type[Any]) -> str:
    return next(n for n in CACHE_NAMES if hasattr(output, n))  # a field has a default


def under_one_name(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Return arguments of forward with the cache under `name`, whichever of the names they had.

    transformers takes the old name as well, by a decorator that a generated forward has not.

    Raises:
        ValueError: two names were given, and two caches.
    """
    names = [n for n in CACHE_NAMES if n in arguments]
    if names in ([], [name]):
        return arguments
    caches = {n: arguments[n] for n in names if arguments[n] is not None}
    cache = next(iter(caches.values()), None)
    if any(c is not cache for c in caches.values()):
        raise ValueError(f"{' and '.join(caches)} are two names for one cache; give one of them")
    return {**{k: v for k, v in arguments.items() if k not in names}, name: cache}
