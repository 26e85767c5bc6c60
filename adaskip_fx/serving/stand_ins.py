"""Modules that take the place of those of a skipped residual branch.

An engine's layer carries its residual stream in one of two ways. Either as one tensor `x`, to which
the layer adds what the branch gives, or as a pair `(h, r)` with ``x = h + r``, where the next norm
does the addition: ``norm(h, r) -> (normed, h + r)``. A branch that is left out is to turn `x` into
``s(x)``, for a surrogate `s`, by replacing its modules alone::

    r, h = h, norm(h)           the branch gives  s(h) - h,  and  r + that  is  s(x)
    h, r = norm(h, r)           (0, s(h + r)),  whose sum is  s(x)

The first module of the branch (its norm, or its body where there is no norm in front) becomes a
`StreamSurrogate`, which does one or the other by how it is called; those behind it become
`PassOn`, which hands on what it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from adaskip_fx.plans.surrogate import EPS, Surrogate

_Tensors = Mapping[str, Any]
_WIDE = frozenset({"scale", "diagonal"})  # kinds whose tensors stay float32


def _multiplied(x: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    return (x.float() * factor).to(x.dtype)


def _normal(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


#: kind -> what the branch adds to the stream x [..., hidden], with the surrogate's tensors
_ADDED: Mapping[str, Callable[[torch.Tensor, _Tensors], torch.Tensor]] = MappingProxyType(
    {
        "scale": lambda x, t: _multiplied(x, t["factor"] - 1.0),
        "diagonal": lambda x, t: _multiplied(x, t["factor"] - 1.0),
        "linear": lambda x, t: linear(x, t["weight"], t["bias"]),
        "low_rank": lambda x, t: linear(linear(x, t["down"]), t["up"], t["bias"]),
        "normalized": lambda x, t: linear(_normal(x), t["weight"], t["bias"]),
    }
)


class StreamSurrogate(nn.Module):
    """What the first module of a skipped branch becomes.

    Its tensors are buffers outside of the state dict: a checkpoint does not hold them, and whoever
    fills weights with random numbers leaves them alone. They are of the stream's dtype, and float32
    for diagonals; a scale is a number in the program.
    """

    def __init__(
        self,
        surrogate: Surrogate | None,
        *,
        multiplier: float = 1.0,
        as_tuple: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Make one.

        Args:
            surrogate: What the branch becomes; None where the stream passes through.
            multiplier: What the layer multiplies a branch with before it adds it.
            as_tuple: Whether its caller unpacks (output, attention weights).
            dtype: Of the stream.
            device: Of the stream; None for torch's default device.
        """
        super().__init__()
        self.kind = surrogate.kind if surrogate is not None else None
        self.number = surrogate.factor if surrogate is not None else None  # of a scale
        self.multiplier, self.as_tuple = multiplier, as_tuple
        tensors = surrogate.tensors if surrogate is not None and self.number is None else {}
        wanted = torch.float32 if self.kind in _WIDE else dtype
        for name, value in tensors.items():
            tensor = torch.tensor(value, dtype=wanted, device=device)
            self.register_buffer(name, tensor, persistent=False)

    def extra_repr(self) -> str:
        """Return the kind of surrogate, in words."""
        return f"{self.kind or 'identity'}{f' {self.number:g}' if self.number else ''}"

    def added(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the skipped branch adds to the stream [..., hidden]."""
        if self.kind is None:
            return torch.zeros_like(x)
        return _ADDED[self.kind](x, self._tensors())

    def becomes(self, x: torch.Tensor) -> torch.Tensor:
        """Return the stream [..., hidden] behind the skipped branch."""
        if self.kind in _WIDE:
            return _multiplied(x, self._tensors()["factor"])
        return x + self.added(x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for a norm, or for a body where there is no norm in front of it.

        Args:
            args: The stream [..., hidden], or `h` and `r` of a pair; or what a body is given.
            kwargs: Likewise; the stream may be called `hidden_states`.

        Returns:
            What the branch adds to the stream; of a pair, (zeros, the new stream).
        """
        streams = _streams(args, kwargs)
        if len(streams) == 1:
            added = self.added(streams[0])
            added = added if self.multiplier == 1.0 else added / self.multiplier
            return (added, None) if self.as_tuple else added
        h, r = streams
        if self.kind is None:
            return h, r  # the next norm adds them
        stream = self.becomes(h + r)
        return torch.zeros_like(stream), stream

    def _tensors(self) -> _Tensors:
        return {"factor": self.number} if self.number is not None else dict(self.named_buffers())


class PassOn(nn.Module):
    """What the other modules of a skipped branch become: they hand on what they get."""

    def __init__(self, as_tuple: bool = False) -> None:
        """Make one.

        Args:
            as_tuple: Whether its caller unpacks (output, attention weights).
        """
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the stream: `hidden_states`, or the first tensor of floats that was given."""
        x = _streams(args, kwargs)[0]
        return (x, None) if self.as_tuple else x


class Nothing(nn.Module):
    """What the body of a skipped branch becomes that shares its norm with another: zeros."""

    def __init__(self, as_tuple: bool = False) -> None:
        """Make one.

        Args:
            as_tuple: Whether its caller unpacks (output, attention weights).
        """
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros like the stream."""
        zeros = torch.zeros_like(_streams(args, kwargs)[0])
        return (zeros, None) if self.as_tuple else zeros


def _streams(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the stream, or the two parts of it, among what a module is called with."""
    if "hidden_states" in kwargs:
        return [kwargs["hidden_states"]]
    # Positions are integers.
    return [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
