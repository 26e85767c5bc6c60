"""What is put in place of the skipped sublayers of a plan: a surrogate for each."""

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

__all__ = ["NONE", "Surrogate", "Surrogates"]

_FORMAT = "adaskip-compensation-1"

#: Factors outside of this are no sublayer's: one of them would drown or erase the stream.
SANE_FACTORS = (1e-4, 1e4)


@dataclass(frozen=True)
class Surrogates:
    """A surrogate for each of some sublayers. Immutable, hashable, equal by value.

    by_sublayer: sublayers without one pass the stream through when they are skipped.
    """

    by_sublayer: Mapping[Sublayer, Surrogate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Sorted, so that the text of a saved plan does not depend on who built it.
        ordered = {s: self.by_sublayer[s] for s in sorted(self.by_sublayer)}
        object.__setattr__(self, "by_sublayer", MappingProxyType(ordered))

    @classmethod
    def scale(cls, factors: Mapping[Sublayer, float]) -> Surrogates:
        """`factor * x` for each (AdaSkip, eq. 4); ValueError, naming it, for one not positive."""
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
        """The numbers of those that are scales."""
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
        """What a skipped `sublayer` becomes; None when the stream passes through unchanged."""
        return self.by_sublayer.get(sublayer)

    def factor(self, sublayer: Sublayer) -> float | None:
        """The scale of a skipped `sublayer`; None where there is none, or a stronger surrogate."""
        found = self.by_sublayer.get(sublayer)
        return found.factor if found is not None else None

    def merged(self, other: Surrogates) -> Surrogates:
        """Both; where both have a surrogate, that of `other`."""
        return Surrogates({**self.by_sublayer, **other.by_sublayer})

    def with_factors(self, extra: Mapping[Sublayer, float]) -> Surrogates:
        """A copy in which the scales `extra` are added and win over what was there."""
        return self.merged(Surrogates.scale(extra)) if extra else self

    def to_json(self) -> dict[str, JSON]:
        """A JSON-compatible form. Scales are whole; of others the kind and the digest."""
        return {
            str(s): {"kind": c.kind, **({"factor": c.factor} if c.kind == "scale" else _named(c))}
            for s, c in self.by_sublayer.items()
        }

    @classmethod
    def from_json(cls, data: Any, tensors: Surrogates | None = None) -> Surrogates:
        """Inverse of `to_json`; ValueError for anything that `to_json` does not write.

        tensors: what has the surrogates that are not scales.
        """
        if not isinstance(data, Mapping) or not all(isinstance(c, Mapping) for c in data.values()):
            raise ValueError("surrogates are an object with one for each sublayer")
        found = {}
        for name, entry in data.items():
            sublayer = Sublayer.parse(name)
            if entry.get("kind") == "scale":
                found[sublayer] = Surrogate.scale(_factor(sublayer, entry.get("factor")))
                continue
            stored = tensors.get(sublayer) if tensors is not None else None
            if stored is None or {"kind": stored.kind, **_named(stored)} != dict(entry):
                raise ValueError(f"the tensors that stand in for {sublayer} are not in its file")
            found[sublayer] = stored
        return cls(found)

    def save(self, path: str | Path) -> None:
        """Write all surrogates to the file `path` (safetensors), whole or not at all."""
        write_atomically(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of such a file."""
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
        """Read saved surrogates; ValueError says which file, what is wrong and what to do."""
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


def _named(surrogate: Surrogate) -> dict[str, JSON]:
    return {"digest": surrogate.digest}


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
            f"scale factor of {sublayer} is {number:.3g}; none outside of {least:g} to {most:g} "
            "can stand in for a sublayer"
        )
    return number


NONE = Surrogates()
