"""What is added in place of a skipped sublayer, and the name of a sublayer.

AdaSkip (arXiv 2501.02336, eq. 4) replaces a skipped sublayer by `scale * x`, one number per
sublayer. Stronger kinds (a factor per channel, a linear map) share this file's shape: a `kind`,
what that kind needs, a digest of it and a JSON form.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, cast, get_args

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Kind = Literal["attention", "ffn", "mixer"]
CompensationKind = Literal["none", "scale"]

_NAME = re.compile(r"(0|[1-9][0-9]*)\.(" + "|".join(get_args(Kind)) + ")")


@dataclass(frozen=True, order=True, slots=True)
class Sublayer:
    """One residual branch `x -> x + f(norm(x))` of decoder layer `layer` (counted from 0)."""

    layer: int
    kind: Kind

    def __post_init__(self) -> None:
        if self.layer < 0 or self.kind not in get_args(Kind):
            raise ValueError(f"no such sublayer: layer {self.layer!r}, kind {self.kind!r}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> Sublayer:
        """Read `"3.attention"`, the form that `str()` writes; ValueError for anything else."""
        match = _NAME.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not a sublayer: write LAYER.KIND with KIND one of "
                f"{', '.join(get_args(Kind))}, for example '3.attention'"
            )
        return cls(int(match[1]), cast(Kind, match[2]))


def canonical_digest(value: JSON) -> str:
    """16 hex characters of the sha256 of `value`, the same for equal values on every machine.

    Key order does not count. Floats enter by `float.hex`: no rounding, no formatting rules.
    """
    text = json.dumps(_exact(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _exact(value: JSON) -> JSON:
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, Mapping):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_exact(item) for item in value]
    return value


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
