"""What is added in place of a skipped sublayer.

AdaSkip (arXiv 2501.02336, eq. 4) replaces a skipped sublayer by `scale * x`, one number per
sublayer. Stronger kinds (a factor per channel, a linear map) share this file's shape: a `kind`,
what that kind needs, a digest of it and a JSON form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from types import MappingProxyType
from typing import Any, Literal, get_args

from adaskip_fx.files import JSON, canonical_digest
from adaskip_fx.sublayer import Sublayer

CompensationKind = Literal["none", "scale"]


@dataclass(frozen=True)
class Compensation:
    """What a skipped sublayer becomes. Immutable, hashable, equal by value.

    kind: `"none"` (skipped sublayers pass the stream through) or `"scale"` (`x -> factor * x`).
    factors: for `"scale"`, one factor per sublayer (no unit); sublayers without one pass through.

    ValueError for an unknown kind, factors under `"none"`, and a factor that is not finite and
    positive (a ratio of norms is both).
    """

    kind: CompensationKind = "none"
    factors: Mapping[Sublayer, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(CompensationKind):
            known = ", ".join(get_args(CompensationKind))
            raise ValueError(f"unknown compensation kind {self.kind!r}: this version has {known}")
        if self.kind == "none" and self.factors:
            raise ValueError("compensation of kind 'none' has no factors: use kind 'scale'")
        # Sorted, so that the text of a saved plan does not depend on who built it.
        factors = {s: _factor(s, self.factors[s]) for s in sorted(self.factors)}
        object.__setattr__(self, "factors", MappingProxyType(factors))

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can be neither pickled nor deep-copied.
        return Compensation, (self.kind, dict(self.factors))

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the content."""
        return canonical_digest(self.to_json())

    def factor(self, sublayer: Sublayer) -> float | None:
        """The scale of a skipped `sublayer`; None when the stream passes through unchanged."""
        return self.factors.get(sublayer)

    def with_factors(self, extra: Mapping[Sublayer, float]) -> Compensation:
        """A copy of kind `"scale"` in which `extra` is added and wins over what was there."""
        if not extra:
            return self
        return Compensation("scale", {**self.factors, **extra})

    def to_json(self) -> dict[str, JSON]:
        """A JSON-compatible form; floats survive JSON exactly."""
        return {"kind": self.kind, "factors": {str(s): f for s, f in self.factors.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Compensation:
        """Inverse of `to_json`; ValueError for anything that `to_json` does not write."""
        if not isinstance(data, Mapping) or not isinstance(data.get("factors"), Mapping):
            raise ValueError("a compensation is an object with 'kind' and 'factors'")
        factors = {Sublayer.parse(name): value for name, value in data["factors"].items()}
        return cls(data.get("kind"), factors)  # type: ignore[arg-type]  # checked on construction


def _factor(sublayer: Sublayer, value: object) -> float:
    number = float(value) if isinstance(value, Real) else math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"scale factor of {sublayer} must be finite and positive, got {value!r}")
    return number


NONE = Compensation()
