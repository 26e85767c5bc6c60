"""A cache of what is known of a function or class, which does not keep that alive."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


def weakly_cached(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """Keep what a function gives of an argument for as long as somebody else has that.

    What it gives must not refer to the argument.
    """
    known: WeakKeyDictionary[Any, T] = WeakKeyDictionary()

    @functools.wraps(function)
    def cached(of: Any) -> T:
        try:
            return known[of]
        except KeyError:
            value = known[of] = function(of)
            return value
        except TypeError:  # there are no weak references to it
            return function(of)

    return cached
