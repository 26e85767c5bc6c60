"""How many tokens a request's buffers are to have memory for."""

from __future__ import annotations

_BLOCK = 256  # it grows in steps of this many tokens at least
_AHEAD = 64  # decoded tokens before it is reached, it begins to grow


def blocks(tokens: int) -> int:
    """Return `tokens`, rounded up to whole blocks."""
    return -(-tokens // _BLOCK) * _BLOCK


def grown(total: int, length: int, expected: int, at_once: int, longest: int) -> int:
    """Return it for `total` tokens and some that are expected, at most twice as many.

    A prompt is followed by a token, which is not to be the one that all is moved for.

    Args:
        total: tokens to be stored.
        length: those that are stored.
        expected: those that the request may come to, if somebody knows; else 0.
        at_once: those that it was said to have from the beginning.
        longest: those that the model is made for.
    """
    more = max(expected, total * 3 // 2 if length else min(total + 1, longest))
    return blocks(max(total, min(more, 2 * total), at_once))


def ahead(tokens: int, total: int, capacity: int, expected: int) -> int | None:
    """Return what it is to grow to before `capacity` is reached; None while there is time.

    Args:
        tokens: new ones; decoding alone grows ahead.
        total: tokens to be stored, with the new ones.
        capacity: what there is memory for.
        expected: as of `grown`.
    """
    if tokens > 1 or total <= _BLOCK or total + _AHEAD <= capacity:
        return None
    more = capacity * 3 // 2
    return blocks(min(expected, more) if expected > total + _AHEAD else more)
