"""The surrogates of a plan: what its skipped sublayers become, as a value and as a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.numpy

from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import SHAPES, Surrogate, SurrogateKind
from adaskip_fx.utils.files import JSON, canonical_digest, write_atomically

__all__ = ["NO_SURROGATES", "Surrogate", "Surrogates"]

_FORMAT = "adaskip-compensation-1"

#: Least and largest factor of a scale: one outside of it would drown or erase the stream.
SANE_FACTORS = (1e-4, 1e4)


@dataclass(frozen=True)
class Surrogates:
    """A surrogate for each of some sublayers. Immutable, hashable, equal by value.

    Attributes:
        by_sublayer: the surrogates. A skipped sublayer without one passes the stream through.
    """

    by_sublayer: Mapping[Sublayer, Surrogate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Sorted, so that the text of a saved plan does not depend on who built it.
        ordered = {s: self.by_sublayer[s] for s in sorted(self.by_sublayer)}
        object.__setattr__(self, "by_sublayer", MappingProxyType(ordered))

    @classmethod
    def scale(cls, factors: Mapping[Sublayer, float]) -> Surrogates:
        """Return the surrogate `factor * x` for each sublayer (AdaSkip, eq. 4).

        Raises:
            ValueError: names a sublayer whose factor is not in `SANE_FACTORS`.
        """
        return cls({s: Surrogate.scale(_factor(s, f)) for s, f in factors.items()})

    def __hash__(self) -> int:
        return hash(self.digest)

    def __bool__(self) -> bool:
        return bool(self.by_sublayer)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can be neither pickled nor deep-copied.
        return Surrogates, (dict(self.by_sublayer),)

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the content."""
        return canonical_digest({str(s): c.digest for s, c in self.by_sublayer.items()})

    @cached_property
    def factors(self) -> Mapping[Sublayer, float]:
        """The factors of those that are scales."""
        found = ((s, c.factor) for s, c in self.by_sublayer.items())
        return MappingProxyType({s: f for s, f in found if f is not None})

    @property
    def kinds(self) -> str:
        """The kinds of its surrogates in words: `linear and scale`; `none` if there are none."""
        return " and ".join(sorted({c.kind for c in self.by_sublayer.values()})) or "none"

    @property
    def parameters(self) -> int:
        """How many numbers all surrogates hold."""
        return sum(c.parameters for c in self.by_sublayer.values())

    def get(self, sublayer: Sublayer) -> Surrogate | None:
        """Return the surrogate of `sublayer`; None when the stream passes through unchanged."""
        return self.by_sublayer.get(sublayer)

    def factor(self, sublayer: Sublayer) -> float | None:
        """Return the factor of the scale of `sublayer`; None for no surrogate or another kind."""
        found = self.by_sublayer.get(sublayer)
        return found.factor if found is not None else None

    def merged(self, other: Surrogates) -> Surrogates:
        """Return the surrogates of both; where both have one, that of `other`."""
        return Surrogates({**self.by_sublayer, **other.by_sublayer})

    def with_factors(self, extra: Mapping[Sublayer, float]) -> Surrogates:
        """Return a copy with the scales `extra` in place of the surrogates that were there."""
        return self.merged(Surrogates.scale(extra)) if extra else self

    def to_json(self) -> dict[str, JSON]:
        """Return the form in JSON: the factor of a scale; the kind and digest of another one."""
        return {str(s): _entry(c) for s, c in self.by_sublayer.items()}

    @classmethod
    def from_json(cls, data: Any, tensors: Surrogates | None = None) -> Surrogates:
        """Return the surrogates that `to_json` wrote.

        Args:
            data: the form in JSON.
            tensors: holds the surrogates that are not scales.

        Raises:
            ValueError: `to_json` does not write this, or `tensors` lacks a surrogate.
        """
        if not isinstance(data, Mapping) or not all(isinstance(c, Mapping) for c in data.values()):
            raise ValueError("surrogates must be an object with an object for each sublayer")
        found = {}
        for name, entry in data.items():
            sublayer = Sublayer.parse(name)
            if entry.get("kind") == "scale":
                found[sublayer] = Surrogate.scale(_factor(sublayer, entry.get("factor")))
                continue
            stored = tensors.get(sublayer) if tensors is not None else None
            if stored is None or _entry(stored) != dict(entry):
                raise ValueError(f"the tensors of {sublayer}'s surrogate are not in its file")
            found[sublayer] = stored
        return cls(found)

    def save(self, path: str | Path) -> None:
        """Write all surrogates to the file `path` (safetensors), whole or not at all."""
        write_atomically(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the content of the file that `save` writes."""
        tensors = {
            f"{s}/{name}": value
            for s, c in self.by_sublayer.items()
            for name, value in c.tensors.items()
        }
        kinds = {str(s): c.kind for s, c in self.by_sublayer.items()}
        about = {"format": _FORMAT, "digest": self.digest, **kinds}
        return bytes(safetensors.numpy.save(tensors, metadata=about))

    @classmethod
    def load(cls, path: str | Path) -> Surrogates:
        """Return saved surrogates.

        Raises:
            ValueError: the message says which file, what is wrong and what to do.
        """
        path = Path(path)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                about = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); fit them again") from error
        if about.pop("format", None) != _FORMAT:
            raise ValueError(f"{path}: not surrogates that this version reads; fit them again")
        digest = about.pop("digest", None)
        try:
            loaded = cls(
                {Sublayer.parse(n): _surrogate(n, kind, tensors) for n, kind in about.items()}
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: not valid surrogates ({error}); fit them again") from error
        if loaded.digest != digest:
            raise ValueError(
                f"{path}: edited after it was saved (digest {digest} is {loaded.digest} now); "
                "fit them again"
            )
        return loaded


def _entry(surrogate: Surrogate) -> dict[str, JSON]:
    if surrogate.factor is not None:
        return {"kind": surrogate.kind, "factor": surrogate.factor}
    return {"kind": surrogate.kind, "digest": surrogate.digest}


def _surrogate(name: str, kind: str, tensors: Mapping[str, np.ndarray[Any, Any]]) -> Surrogate:
    if kind not in SHAPES:
        raise ValueError(f"unknown surrogate {kind!r} of {name}")
    known = cast(SurrogateKind, kind)
    return Surrogate(known, {part: tensors[f"{name}/{part}"] for part in SHAPES[known]})


def _factor(sublayer: Sublayer, value: object) -> float:
    number = float(value) if isinstance(value, Real) else math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"scale factor of {sublayer} must be finite and positive, got {value!r}")
    least, most = SANE_FACTORS
    if not least <= number <= most:
        raise ValueError(
            f"scale factor of {sublayer} is {number:.3g}; no sublayer can be replaced by one "
            f"outside of {least:g} to {most:g}"
        )
    return number


NO_SURROGATES = Surrogates()
