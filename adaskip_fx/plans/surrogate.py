"""The surrogate of one skipped sublayer: what it becomes, of a kind, with tensors.

The kinds, from cheap to strong, for a stream `x` of width H:

- `"scale"`: `factor * x`, one number (AdaSkip, arXiv 2501.02336, eq. 4);
- `"diagonal"`: `factor * x`, a number for each channel;
- `"low_rank"`: `x + (x down^T) up^T + bias`, 2 H r weights;
- `"linear"`: `x + x weight^T + bias`, H^2 weights (NBL, arXiv 2505.21077);
- `"normalized"`: `x + (x / rms(x)) weight^T + bias`: like a sublayer, whose first step is its norm,
  it adds the same whatever the size of x.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from adaskip_fx.utils.files import JSON, canonical_digest

SurrogateKind = Literal["scale", "diagonal", "low_rank", "linear", "normalized"]
Array = npt.NDArray[np.floating[Any]]

EPS = 1e-6  #: under the root of the mean square that a normalized map divides by
#: kind -> its tensors, by the letters of their dimensions
SHAPES: Mapping[SurrogateKind, Mapping[str, str]] = MappingProxyType(
    {
        "scale": {"factor": ""},
        "diagonal": {"factor": "H"},
        "low_rank": {"down": "rH", "up": "Hr", "bias": "H"},
        "linear": {"weight": "HH", "bias": "H"},
        "normalized": {"weight": "HH", "bias": "H"},
    }
)


@dataclass(frozen=True, eq=False)
class Surrogate:
    """One sublayer's replacement. Immutable, hashable, equal by value.

    Attributes:
        kind: which function of the stream it is.
        tensors: by name, as in `SHAPES`; float32, but float64 for the one number of a scale. Copied
            and read-only.

    Raises:
        ValueError: an unknown kind, other tensors or shapes than the kind has, a value that is not
            finite, or a scale that is not positive (a ratio of norms is).
    """

    kind: SurrogateKind
    tensors: Mapping[str, Array]

    def __post_init__(self) -> None:
        if self.kind not in SHAPES:
            known = ", ".join(get_args(SurrogateKind))
            raise ValueError(f"unknown surrogate {self.kind!r}: this version has {known}")
        expected = SHAPES[self.kind]
        if set(self.tensors) != set(expected):
            raise ValueError(
                f"a {self.kind} surrogate has tensors {', '.join(expected)}, "
                f"got {', '.join(sorted(self.tensors)) or 'none'}"
            )
        frozen = {name: _frozen(self.tensors[name]) for name in expected}
        _check(self.kind, frozen)
        object.__setattr__(self, "tensors", MappingProxyType(frozen))

    @classmethod
    def scale(cls, factor: float) -> Surrogate:
        """Return the surrogate `factor * x`.

        Raises:
            ValueError: `factor` is not finite, or not positive.
        """
        return cls("scale", {"factor": np.array(factor, np.float64)})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Surrogate) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can be neither pickled nor deep-copied.
        return Surrogate, (self.kind, dict(self.tensors))

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the content."""
        return canonical_digest({"kind": self.kind, "tensors": _hashes(self.tensors)})

    @property
    def factor(self) -> float | None:
        """The number of a scale; None for another kind."""
        return float(self.tensors["factor"]) if self.kind == "scale" else None

    @property
    def rank(self) -> int:
        """The rank of a low-rank map; 0 for another kind."""
        return int(self.tensors["down"].shape[0]) if self.kind == "low_rank" else 0

    @property
    def width(self) -> int | None:
        """H, the hidden size of the model; None for a scale, which fits any."""
        wide = [n for n, letters in SHAPES[self.kind].items() if letters == "H"]
        return int(self.tensors[wide[0]].shape[0]) if wide else None

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(t.size for t in self.tensors.values())

    def __str__(self) -> str:
        """Return a word for a table: the number of a scale, `linear`, or `rank 64`."""
        if self.factor is not None:
            return f"\N{MULTIPLICATION SIGN}{self.factor:.3f}"
        return f"rank {self.rank}" if self.rank else self.kind


def _frozen(value: npt.ArrayLike) -> Array:
    array = np.asarray(value)
    frozen: Array = np.array(array, dtype=np.float64 if array.ndim == 0 else np.float32, order="C")
    frozen.flags.writeable = False
    return frozen


def _check(kind: SurrogateKind, tensors: Mapping[str, Array]) -> None:
    sizes: dict[str, int] = {}
    for name, letters in SHAPES[kind].items():
        shape = tensors[name].shape
        fits = len(shape) == len(letters) and all(
            sizes.setdefault(letter, size) == size
            for letter, size in zip(letters, shape, strict=True)
        )
        if not fits or 0 in shape:
            wanted = f"[{', '.join(letters)}]"
            raise ValueError(
                f"{name} of a {kind} surrogate has shape {list(shape)}, expected {wanted}"
                + (f" with {', '.join(f'{k} = {v}' for k, v in sizes.items())}" if sizes else "")
            )
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"{name} of a {kind} surrogate must be finite")
    if kind == "scale" and not tensors["factor"] > 0:
        raise ValueError(
            f"factor of a scale surrogate must be positive, got {float(tensors['factor'])!r}"
        )


def _hashes(tensors: Mapping[str, Array]) -> dict[str, JSON]:
    return {
        name: float(t)
        if t.ndim == 0
        else [list(t.shape), hashlib.sha256(t.astype("<f4").tobytes()).hexdigest()]
        for name, t in tensors.items()
    }
