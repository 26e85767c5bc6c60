"""Checks of a profile: each raises a `ProfileError` that says what is wrong and where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from adaskip_fx.plans.sublayer import Sublayer
from adaskip_passes.errors import AdaskipError

PROBE_STATS = ("cosine", "ratio", "before_squared", "after_squared", "tokens")
Array = npt.NDArray[np.float64]


class ProfileError(AdaskipError, ValueError):
    """A profile that is damaged, impossible, or of another model."""


def frozen(values: npt.ArrayLike) -> Array:
    """Return a float64 copy that cannot be written to."""
    copied: Array = np.array(values, dtype=np.float64, order="C")
    copied.flags.writeable = False
    return copied


def json_copy(name: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a read-only copy of `value`, which must be an object that JSON can hold."""
    try:
        return MappingProxyType(dict(json.loads(json.dumps(dict(value), allow_nan=False))))
    except (TypeError, ValueError) as error:
        raise ProfileError(f"{name} must be an object that JSON can hold: {error}") from error


def check_statistics(sublayers: tuple[Sublayer, ...], statistics: Array) -> None:
    """Refuse statistics of another shape, that are not finite, or of a sample without tokens."""
    expected = f"[samples, {len(sublayers)} sublayers, {len(PROBE_STATS)}]"
    if statistics.ndim != 3 or statistics.shape[1:] != (len(sublayers), len(PROBE_STATS)):
        raise ProfileError(f"statistics have shape {list(statistics.shape)}, expected {expected}")
    if not statistics.size:
        raise ProfileError(f"statistics are empty: at least one sample of {expected} is needed")
    not_finite = ~np.isfinite(statistics).all(axis=2)
    no_tokens = statistics[:, :, PROBE_STATS.index("tokens")] <= 0
    for bad, problem in ((not_finite, "not finite"), (no_tokens, "no tokens")):
        if bad.any():
            sample, sublayer = np.argwhere(bad)[0]
            raise ProfileError(f"{sublayers[sublayer]}: {problem} in sample {sample}")


def check_layers(numbers: tuple[int, ...], layers: Array, samples: int) -> None:
    """Refuse statistics of whole layers, for the same reasons as those of sublayers."""
    if layers.shape != (samples, len(numbers), len(PROBE_STATS)):
        raise ProfileError(
            f"layers have shape {list(layers.shape)}, expected "
            f"[{samples} samples, {len(numbers)} layers, {len(PROBE_STATS)}]"
        )
    bad = ~np.isfinite(layers).all(axis=2) | (layers[:, :, PROBE_STATS.index("tokens")] <= 0)
    if bad.any():
        sample, index = np.argwhere(bad)[0]
        raise ProfileError(f"layer {numbers[index]}: not finite, or no tokens, in sample {sample}")


def check_left_out(left_out: Array, statistics: Array) -> None:
    """Refuse counts of left-out tokens of another shape, negative or not finite."""
    if left_out.shape != statistics.shape[:2]:
        raise ProfileError(
            f"left_out has shape {list(left_out.shape)}, expected {list(statistics.shape[:2])}, "
            "[samples, sublayers]"
        )
    if not (np.isfinite(left_out) & (left_out >= 0)).all():
        raise ProfileError("left_out has a number that is negative or not finite")


def check_windows(
    sublayers: tuple[Sublayer, ...], kv_heads: Mapping[Sublayer, int], samples: int, expected: int
) -> None:
    """Refuse windows of what is no attention of the model, or of other samples."""
    unknown = [s for s in kv_heads if s not in sublayers or s.kind != "attention"]
    if unknown:
        raise ProfileError(f"windows were measured of {unknown[0]}, which is no attention here")
    if samples != expected:
        raise ProfileError(f"windows were measured on {samples} samples, the rest on {expected}")
