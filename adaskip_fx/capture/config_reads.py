"""What a model reads of its config while it is traced.

A config of transformers looks up every name that is read of it, in code of its own: names that it
has under others, settings that differ by layer. Tracing that code takes longer than many an
operation, for values that lie in the config's dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from transformers import PreTrainedConfig

from ..utils.torch_internals import reading_stored


def traced_once() -> AbstractContextManager[None]:
    """Trace a config's own code of reads once, while models are traced, and not for every read."""
    return reading_stored(_plain_name)


def _plain_name(value: object, name: str) -> str | None:
    """Return the name under which Python's own lookup finds what a config gives for a name.

    What it gives is asked of it. None where that is something else; then the read is traced.
    """
    if not isinstance(value, PreTrainedConfig):
        return None
    plain = type(value).attribute_map.get(name, name)
    try:
        given, found = _read(getattr, value, name), _read(object.__getattribute__, value, plain)
    except Exception:  # of the read, which is traced
        return None
    computed = type(given) is type(found) and isinstance(given, str | int | float)
    return plain if given is found or (computed and given == found) else None


def _read(read: Callable[[object, str], object], value: object, name: str) -> object:
    try:
        return read(value, name)
    except AttributeError:
        return AttributeError
