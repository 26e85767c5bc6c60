"""What is put in place of the skipped sublayers of a plan: a stand-in for each."""

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
from adaskip_fx.plans.surrogate import SHAPES, StandIn, StandInKind
from adaskip_fx.utils.files import JSON, canonical_digest, write_atomically

__all__ = ["NONE", "Compensation", "StandIn"]

_FORMAT = "adaskip-compensation-1"

#: Factors outside of this are no sublayer's: one of them would drown or erase the stream.
SANE_FACTORS = (1e-4, 1e4)


@dataclass(frozen=True)
class Compensation:
    """A stand-in for each of some sublayers. Immutable, hashable, equal by value.

    stand_ins: sublayers without one pass the stream through when they are skipped.
    """

    stand_ins: Mapping[Sublayer, StandIn] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Sorted, so that the text of a saved plan does not depend on who built it.
        ordered = {s: self.stand_ins[s] for s in sorted(self.stand_ins)}
        object.__setattr__(self, "stand_ins", MappingProxyType(ordered))

    @classmethod
    def scale(cls, factors: Mapping[Sublayer, float]) -> Compensation:
        """`factor * x` for each (AdaSkip, eq. 4); ValueError, naming it, for one not positive."""
        return cls({s: StandIn.scale(_factor(s, f)) for s, f in factors.items()})

    def __hash__(self) -> int:
        return hash(self.digest)

    def __bool__(self) -> bool:
        return bool(self.stand_ins)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can be neither pickled nor deep-copied.
        return Compensation, (dict(self.stand_ins),)

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the content."""
        return canonical_digest({str(s): c.digest for s, c in self.stand_ins.items()})

    @cached_property
    def factors(self) -> Mapping[Sublayer, float]:
        """The numbers of those that are scales."""
        found = ((s, c.factor) for s, c in self.stand_ins.items())
        return MappingProxyType({s: f for s, f in found if f is not None})

    @property
    def kinds(self) -> str:
        """The kinds of its stand-ins, in words: `linear and scale`; `none` where there are none."""
        return " and ".join(sorted({c.kind for c in self.stand_ins.values()})) or "none"

    @property
    def parameters(self) -> int:
        """How many numbers all stand-ins hold."""
        return sum(c.parameters for c in self.stand_ins.values())

    def stand_in(self, sublayer: Sublayer) -> StandIn | None:
        """What a skipped `sublayer` becomes; None when the stream passes through unchanged."""
        return self.stand_ins.get(sublayer)

    def factor(self, sublayer: Sublayer) -> float | None:
        """The scale of a skipped `sublayer`; None where there is none, or a stronger stand-in."""
        found = self.stand_ins.get(sublayer)
        return found.factor if found is not None else None

    def merged(self, other: Compensation) -> Compensation:
        """Both; where both have a stand-in, that of `other`."""
        return Compensation({**self.stand_ins, **other.stand_ins})

    def with_factors(self, extra: Mapping[Sublayer, float]) -> Compensation:
        """A copy in which the scales `extra` are added and win over what was there."""
        return self.merged(Compensation.scale(extra)) if extra else self

    def to_json(self) -> dict[str, JSON]:
        """A JSON-compatible form. Scales are whole; of others the kind and the digest."""
        return {
            str(s): {"kind": c.kind, **({"factor": c.factor} if c.kind == "scale" else _named(c))}
            for s, c in self.stand_ins.items()
        }

    @classmethod
    def from_json(cls, data: Any, tensors: Compensation | None = None) -> Compensation:
        """Inverse of `to_json`; ValueError for anything that `to_json` does not write.

        tensors: what has the stand-ins that are not scales.
        """
        if not isinstance(data, Mapping) or not all(isinstance(c, Mapping) for c in data.values()):
            raise ValueError("a compensation is an object with a stand-in for each sublayer")
        found = {}
        for name, entry in data.items():
            sublayer = Sublayer.parse(name)
            if entry.get("kind") == "scale":
                found[sublayer] = StandIn.scale(_factor(sublayer, entry.get("factor")))
                continue
            stored = tensors.stand_in(sublayer) if tensors is not None else None
            if stored is None or {"kind": stored.kind, **_named(stored)} != dict(entry):
                raise ValueError(f"the tensors that stand in for {sublayer} are not in its file")
            found[sublayer] = stored
        return cls(found)

    def save(self, path: str | Path) -> None:
        """Write all stand-ins to the file `path` (safetensors), whole or not at all."""
        write_atomically(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of such a file."""
        tensors = {
            f"{s}/{name}": value
            for s, c in self.stand_ins.items()
            for name, value in c.tensors.items()
        }
        kinds = {str(s): c.kind for s, c in self.stand_ins.items()}
        about = {"format": _FORMAT, "digest": self.digest, **kinds}
        return bytes(safetensors.numpy.save(tensors, metadata=about))

    @classmethod
    def load(cls, path: str | Path) -> Compensation:
        """Read a saved compensation; ValueError says which file, what is wrong and what to do."""
        path = Path(path)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                about = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); fit it again") from error
        if about.pop("format", None) != _FORMAT:
            raise ValueError(f"{path}: not a compensation that this version reads; fit it again")
        digest = about.pop("digest", None)
        try:
            loaded = cls(
                {Sublayer.parse(n): _stand_in(n, kind, tensors) for n, kind in about.items()}
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a valid compensation ({error}); fit it again") from error
        if loaded.digest != digest:
            raise ValueError(
                f"{path}: edited after it was saved (digest {digest} is {loaded.digest} now); "
                "fit it again"
            )
        return loaded


def _named(stand_in: StandIn) -> dict[str, JSON]:
    return {"digest": stand_in.digest}


def _stand_in(name: str, kind: str, tensors: Mapping[str, np.ndarray[Any, Any]]) -> StandIn:
    if kind not in SHAPES:
        raise ValueError(f"unknown stand-in {kind!r} of {name}")
    known = cast(StandInKind, kind)
    return StandIn(known, {part: tensors[f"{name}/{part}"] for part in SHAPES[known]})


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


NONE = Compensation()
