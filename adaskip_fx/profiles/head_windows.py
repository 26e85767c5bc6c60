"""What windows would do to K/V heads, as a part of a profile: plain sums for each head alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.windows import Window
from adaskip_fx.profiles.validation import Array, ProfileError, frozen
from adaskip_fx.utils.files import JSON

#: What is measured of a head and a window, summed over tokens: 1 - cos(a, b), of the stream after
#: the layer as it is and as the window would make it; its power of 3/2; and 1, so how many tokens
#: count.
WINDOW_STATS = ("dissimilarity", "power", "tokens")

Head = tuple[Sublayer, int]
Average = Literal["power", "mean"]


@dataclass(frozen=True, eq=False)
class HeadWindows:
    """What each K/V head alone would change if it saw a window. Immutable.

    Attributes:
        windows: What was measured, without full heads.
        kv_heads: How many K/V heads attention has, of each sublayer that was measured.
        statistics: float64 [samples, K/V heads, windows, 3], sums over the valid tokens of each
            sample of `WINDOW_STATS`; heads in the order of `kv_heads`. Copied and read-only.

    Raises:
        ProfileError: no windows or heads, a wrong shape, a number that is negative or not finite,
            or a head without tokens.
    """

    windows: tuple[Window, ...]
    kv_heads: Mapping[Sublayer, int]
    statistics: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(self.windows))
        object.__setattr__(self, "kv_heads", MappingProxyType(dict(self.kv_heads)))
        object.__setattr__(self, "statistics", frozen(self.statistics))
        expected = (len(self.heads), len(self.windows), len(WINDOW_STATS))
        shape = self.statistics.shape
        if len(shape) != 4 or shape[1:] != expected or not self.statistics.size:
            raise ProfileError(
                f"windows have shape {list(shape)}, expected [samples, {expected[0]} K/V heads, "
                f"{expected[1]} windows, {expected[2]}]"
            )
        if any(w.full_heads for w in self.windows) or len(set(self.windows)) < len(self.windows):
            raise ProfileError("windows that were measured differ, and have no full heads")
        bad = ~np.isfinite(self.statistics).all((0, 2, 3)) | (self.statistics < 0).any((0, 2, 3))
        bad |= (self.statistics[..., WINDOW_STATS.index("tokens")] <= 0).any((0, 2))
        if bad.any():
            sublayer, head = self.heads[int(np.argmax(bad))]
            raise ProfileError(
                f"{sublayer}, K/V head {head}: windows have a number that is negative or not "
                "finite, or no tokens"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can be neither pickled nor deep-copied.
        return HeadWindows, (self.windows, dict(self.kv_heads), self.statistics)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The K/V heads that were measured, in the order of the statistics."""
        return tuple((s, head) for s, count in self.kv_heads.items() for head in range(count))

    def dissimilarity(self, window: Window, average: Average = "power") -> dict[Head, float]:
        """Return for each K/V head 1 - cosine of the stream with and without `window`, averaged.

        The stream is that after the layer; the average is over all tokens, of which those that see
        no less through the window count as 0.

        Args:
            window: one that was measured.
            average: `"power"` takes the power mean of exponent 3/2, in which a few tokens that
                change much count more than many that change little: so does a head that retrieves;
                `"mean"` takes the mean.

        Raises:
            ProfileError: this window was not measured.
            ValueError: an unknown average.
        """
        if average not in get_args(Average):
            raise ValueError(f"unknown average {average!r}: use 'power' or 'mean'")
        if window not in self.windows:
            raise ProfileError(
                f"a {window} was not measured in this profile: there is {self}. Take one of these, "
                "or calibrate again with it"
            )
        sums = self.statistics[:, :, self.windows.index(window)].sum(axis=0)
        mean, power = (sums[:, :2] / sums[:, 2:]).T
        averages = power ** (2 / 3) if average == "power" else mean
        return dict(zip(self.heads, averages.tolist(), strict=True))

    def __str__(self) -> str:
        """Return ``window 4+256, window 4+1024``."""
        return ", ".join(map(str, self.windows))

    def to_json(self) -> dict[str, JSON]:
        """Return the form in JSON of all but the statistics."""
        return {
            "windows": [{"tokens": w.tokens, "sinks": w.sinks} for w in self.windows],
            "kv_heads": [[str(s), count] for s, count in self.kv_heads.items()],
        }

    @classmethod
    def from_json(cls, data: Any, statistics: Array) -> HeadWindows:
        """Return what `to_json` wrote, with its statistics.

        Raises:
            ValueError, TypeError: `to_json` does not write this.
        """
        if not isinstance(data, Mapping) or set(data) != {"windows", "kv_heads"}:
            raise ValueError("windows must be an object with windows and kv_heads")
        windows = tuple(Window(**w) for w in data["windows"])
        heads = {Sublayer.parse(s): count for s, count in data["kv_heads"]}
        return cls(windows, heads, statistics)


def check_windows(windows: Sequence[Window], longest: int) -> None:
    """Refuse windows that calibration would learn nothing of.

    Args:
        windows: What is to be measured.
        longest: Tokens of the longest sample.

    Raises:
        ValueError: One is named twice, has full heads, or sees all of the longest sample.
    """
    for number, window in enumerate(windows):
        if window.full_heads:
            raise ValueError(f"each head is measured alone: give {window} without full_heads")
        if window in windows[:number]:
            raise ValueError(f"{window} is given twice")
        if window.seen(longest) >= longest:
            raise ValueError(
                f"a {window} sees all of the longest text, which has {longest} tokens: give longer "
                "texts, a larger max_length, or a smaller window"
            )
