"""A linear recurrence over a prompt as one operator, while a model is traced.

State-space models ask for ``associative_scan`` over pairs ``(a, b)`` with the combination
``(a1 a2, a2 b1 + b2)``, which is ``h[t] = a[t] h[t-1] + b[t]``. Where it is not a single operation
(on a CPU), tracing it writes out a tree of halves, whose shape depends on every bit of the length:
the graph would be good for one length only. As an operator it is good for all, on a GPU as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from .. import _torch

_MODULE = _torch.scan_module()
_traced: Callable[..., Any] = _MODULE.associative_scan
_BLOCK = 16


@torch.library.custom_op("adaskip::linear_scan", mutates_args=())
def linear_scan(a: torch.Tensor, b: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """Return running products, and the states of a linear recurrence.

    The products are those of `a` along `dim`; the states are ``h[t] = a[t] h[t-1] + b[t]`` with
    ``h[-1] = 0``.

    Args:
        a: The factors.
        b: The terms; of the shape and dtype of `a`.
        dim: The dimension over which it runs.

    """
    states = recurrence(a.movedim(dim, 0).unsqueeze(0), b.movedim(dim, 0).unsqueeze(0))
    return [torch.cumprod(a, dim), states[0].movedim(0, dim).contiguous()]


def recurrence(factors: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """Return ``h[t] = factors[t] h[t-1] + terms[t]``, ``h[-1] = 0``, in few operations.

    Blocks of 16 are worked on side by side; what their ends hand on to each other is the same
    again, a sixteenth as long.

    Args:
        factors: [B, T, ...], broadcast to the shape of `terms`.
        terms: [B, T, ...].

    Returns:
        Of the shape and dtype of `terms`.
    """
    tokens, states = terms.shape[1], torch.empty_like(terms)
    whole = tokens // _BLOCK * _BLOCK if tokens > 2 * _BLOCK else 0
    if whole:
        a, b, inner = (
            torch.unflatten(t[:, :whole], 1, (-1, _BLOCK)) for t in (factors, terms, states)
        )
        inner[:, :, 0] = b[:, :, 0]
        for i in range(1, _BLOCK):
            torch.addcmul(b[:, :, i], a[:, :, i], inner[:, :, i - 1], out=inner[:, :, i])
        products = torch.cumprod(a, 2)
        ends = recurrence(products[:, :, -1], inner[:, :, -1])
        inner[:, 1:].addcmul_(products[:, 1:], ends[:, :-1].unsqueeze(2))
    for t in range(whole, tokens):
        if t == 0:
            states[:, 0] = terms[:, 0]
        else:
            torch.addcmul(terms[:, t], factors[:, t], states[:, t - 1], out=states[:, t])
    return states


@linear_scan.register_fake
def _(a: torch.Tensor, b: torch.Tensor, dim: int) -> list[torch.Tensor]:
    return [torch.empty_like(a), torch.empty_like(b)]


@contextmanager
def one_operator() -> Iterator[None]:
    """Let linear recurrences be traced as `linear_scan`; others are traced as they were."""
    with patch.object(_MODULE, "associative_scan", _scan):
        yield


def _scan(
    combine_fn: Callable[..., Any],
    xs: Sequence[Any],
    dim: int,
    reverse: bool = False,
    combine_mode: str = "pointwise",
    **options: Any,
) -> Any:
    if not reverse and len(xs) == 2 and _is_linear(combine_fn):
        return torch.ops.adaskip.linear_scan(xs[0], xs[1], dim)
    return _traced(combine_fn, xs, dim, reverse, combine_mode, **options)


def _is_linear(combine_fn: Callable[..., Any]) -> bool:
    """Return whether a combination is that of a linear recurrence, by what it makes of numbers.

    It is a polynomial without a constant; three pairs tell it from others that it might be.
    """
    first = combine_fn((2.0, 3.0), (5.0, 7.0)) == (10.0, 22.0)
    second = combine_fn((3.0, 1.0), (0.5, 4.0)) == (1.5, 4.5)
    third = combine_fn((0.25, -8.0), (-2.0, 0.5)) == (-0.5, 16.5)
    return bool(first and second and third)
