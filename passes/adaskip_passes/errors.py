"""The errors that this package and ``adaskip_fx`` raise on purpose."""

from __future__ import annotations


class AdaskipError(Exception):
    """Base class of every error that adaskip_fx and adaskip_passes define.

    Each is also a ``ValueError`` or a ``RuntimeError``, whichever Python would have raised.
    """


class UnsupportedError(AdaskipError, RuntimeError):
    """What was asked for cannot be captured, cut or rewritten with proof that the result is right.

    The message says what was refused, where in the model, and what to do about it.

    """


#: The name that `UnsupportedError` had before 0.1.0.
RefusedError = UnsupportedError
