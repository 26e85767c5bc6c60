"""A linear recurrence over a prompt as one operator, while a model is traced.

State-space models ask for ``associative_scan`` over pairs ``(a, b)`` with the combination
``(a1 a2, a2 b1 + b2)``, which is ``h[t] = a[t] h[t-1] + b[t]``. Where it is not a single operation
(on a CPU), tracing it writes out a tree of halves, whose shape depends on every bit of the length:
the graph would be good for one length only. As an operator it is good for all.
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
    state, states = None, []
    for factor, term in zip(a.unbind(dim), b.unbind(dim), strict=True):
        state = term if state is None else torch.addcmul(term, factor, state)
        states.append(state)
    return [torch.cumprod(a, dim), torch.stack(states, dim)]


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
    if combine_mode == "generic" and not reverse and len(xs) == 2 and _is_linear(combine_fn):
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
