"""The one exception of this package."""

from __future__ import annotations


class RefusedError(RuntimeError):
    """A graph cannot be captured, cut or rewritten with proof that the result is right.

    The message says what was refused, where in the model, and what to do about it.
    """
