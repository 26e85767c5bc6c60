"""Profiles: what calibration measured on a model, as plain numbers with a fingerprint.

Only sums are kept (per sample and sublayer), so that every average of the paper and of its
released code can be formed later without running the model again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import SANE_FACTORS, Surrogates
from adaskip_fx.plans.tables import TIMES, layer_table
from adaskip_fx.profiles import folder, validation
from adaskip_fx.profiles.fingerprint import Fingerprint, fingerprint, is_of
from adaskip_fx.profiles.head_windows import HeadWindows
from adaskip_fx.profiles.validation import PROBE_STATS, Array, ProfileError
from adaskip_fx.utils.files import JSON

__all__ = [
    "PROBE_STATS",
    "Array",
    "Fingerprint",
    "Profile",
    "ProfileError",
    "Variant",
    "fingerprint",
]

Variant = Literal["paper", "released"]


@dataclass(frozen=True, eq=False)
class Profile:
    """What calibration measured. Immutable, hashable, equal by content.

    Attributes:
        sublayers: all of the model's, in stream order.
        statistics: float64 [samples, sublayers, 5], sums over the valid tokens of each sample of
            `PROBE_STATS`: cos(a, b); |b| / |a|; |a|^2; |b|^2; 1 (a and b: the residual stream
            before and after the sublayer). A token with a or b of length zero or not finite is in
            none. Copied and read-only.
        fingerprint: identifies the model.
        versions: of the libraries used.
        calibration: a description of the texts, anything that JSON can hold.
        layers: float64 [samples, layers, 5], the same of whole layers, before their first sublayer
            and after their last; None in profiles of versions that did not measure them.
        left_out: float64 [samples, sublayers], how many valid tokens are not in the statistics;
            None where all are.
        windows: what windows would do to K/V heads; None where that was not measured.

    Raises:
        ProfileError: a wrong shape, a statistic that is not finite, or a sublayer without tokens.
    """

    sublayers: tuple[Sublayer, ...]
    statistics: Array
    fingerprint: Fingerprint
    versions: Mapping[str, str]
    calibration: Mapping[str, JSON]
    layers: Array | None = None
    left_out: Array | None = None
    windows: HeadWindows | None = None

    def __post_init__(self) -> None:
        statistics = validation.frozen(self.statistics)
        object.__setattr__(self, "sublayers", tuple(self.sublayers))
        object.__setattr__(self, "statistics", statistics)
        for name in ("versions", "calibration"):
            object.__setattr__(self, name, validation.json_copy(name, getattr(self, name)))
        validation.check_statistics(self.sublayers, statistics)
        if self.layers is not None:
            layers = validation.frozen(self.layers)
            object.__setattr__(self, "layers", layers)
            validation.check_layers(self.layer_numbers, layers, len(statistics))
        if self.left_out is not None:
            left_out = validation.frozen(self.left_out)
            validation.check_left_out(left_out, statistics)
            object.__setattr__(self, "left_out", left_out if left_out.any() else None)
        if self.windows is not None:
            through = self.windows.kv_heads, len(self.windows.statistics)
            validation.check_windows(self.sublayers, *through, len(statistics))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can be neither pickled nor deep-copied.
        about = (self.fingerprint, dict(self.versions), dict(self.calibration))
        more = self.layers, self.left_out, self.windows
        return Profile, (self.sublayers, self.statistics, *about, *more)

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the content."""
        return folder.digest_of(self)

    @property
    def tokens(self) -> int:
        """Valid tokens over all samples, also those that a sublayer's statistics leave out."""
        left_out = 0.0 if self.left_out is None else self.left_out[:, 0].sum()
        return round(float(self._sum("tokens")[0] + left_out))

    @property
    def left_out_tokens(self) -> Mapping[Sublayer, int]:
        """How many tokens a sublayer's statistics leave out, where it is not 0."""
        if self.left_out is None:
            return {}
        sums = zip(self.sublayers, self.left_out.sum(axis=0).tolist(), strict=True)
        return {s: round(n) for s, n in sums if n}

    def similarity(self, variant: Variant = "paper") -> Array:
        """Return the mean cosine of the stream before and after each sublayer, [sublayers].

        Args:
            variant: `"paper"` takes the mean over all tokens (eq. 2); `"released"` the mean over
                samples of each sample's mean.
        """
        _check_variant(variant)
        if variant == "paper":
            return self._sum("cosine") / self._sum("tokens")
        return np.asarray((self._of("cosine") / self._of("tokens")).mean(axis=0))

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The decoder layers, in order."""
        return tuple(sorted({s.layer for s in self.sublayers}))

    def layer_similarity(self) -> Array:
        """Return the mean cosine of the stream before and after each layer, [layers].

        The mean is over all tokens. 1 minus it is ShortGPT's block influence (arXiv 2403.03853,
        eq. 1).

        Raises:
            ProfileError: the profile is of a version that did not measure layers.
        """
        if self.layers is None:
            raise ProfileError(
                "this profile was measured before whole layers were; calibrate again"
            )
        sums = self.layers.sum(axis=0)
        return np.asarray(
            sums[:, PROBE_STATS.index("cosine")] / sums[:, PROBE_STATS.index("tokens")]
        )

    def scale(self, variant: Variant = "paper") -> Array:
        """Return the factor that would replace each sublayer, [sublayers], without unit.

        Args:
            variant: `"paper"` takes the mean of |b| / |a| over all tokens (eq. 3); `"released"` the
                ratio of whole-sample norms, sqrt(sum |b|^2 / sum |a|^2), averaged over samples.
        """
        _check_variant(variant)
        if variant == "paper":
            return self._sum("ratio") / self._sum("tokens")
        with np.errstate(divide="ignore", invalid="ignore"):  # `scales` names the sublayer
            ratio = self._of("after_squared") / self._of("before_squared")
        return np.asarray(np.sqrt(ratio).mean(axis=0))

    def scales(self, variant: Variant = "paper") -> Surrogates:
        """Return `scale` of every sublayer as its surrogate.

        Raises:
            ProfileError: names the sublayer whose factor is outside of `SANE_FACTORS`: a plan with
                it would compute nothing of use, so `compile` does not get as far as that.
        """
        factors = dict(zip(self.sublayers, self.scale(variant).tolist(), strict=True))
        least, most = SANE_FACTORS
        for sublayer, factor in factors.items():
            if not least <= factor <= most:
                raise ProfileError(
                    f"scale factor of {sublayer} is {factor:.3g} in this profile, and no sublayer "
                    f"can be replaced by one outside of {least:g} to {most:g}: the stream of some "
                    "token was almost zero, or grew beyond measure. Calibrate again, on texts "
                    "without padding or unknown tokens, or in a wider dtype"
                )
        return Surrogates.scale(factors)

    def check(self, model: Any) -> None:
        """Refuse a model of another architecture than the one measured.

        Weights, their dtype and quantization, adapters, added tokens and the attention kernel may
        be others than they were.

        Raises:
            ProfileError: the message names both.
        """
        if not is_of(self.fingerprint, model):
            actual = fingerprint(model)
            raise ProfileError(
                f"this profile was measured on {self.fingerprint}, but the model is {actual}; "
                "load the profile of this model, or calibrate it"
            )

    def save(self, path: str | Path) -> None:
        """Write the folder `path`: `profile.json` and the tensor file that it names.

        A crash at any point leaves the old profile or the new one, whole. Only one process may
        write at a time.

        Raises:
            ProfileError: `path` is a file, or a folder that holds something else.
        """
        folder.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Return a saved profile.

        Raises:
            ProfileError: the message says which file, what is wrong and what to do.
        """
        return folder.load(cls, Path(path))

    def __str__(self) -> str:
        """Return a heading and one row per layer: similarity, then the scale in parentheses.

        Last lines say what is left out of these means, and which windows were measured, if any.
        """
        similarity = dict(zip(self.sublayers, self.similarity(), strict=True))
        scale = dict(zip(self.sublayers, self.scale(), strict=True))
        table = layer_table(
            self.sublayers, lambda s: f"{similarity[s]:.4f} ({TIMES}{scale[s]:.4f})", " similarity"
        )
        return (
            f"Profile {self.digest[:8]}: {self.fingerprint.model_type}, {self.tokens:,} tokens "
            f"in {len(self.statistics)} samples\n{table}{self._left_out_text()}"
            f"{f'{chr(10)}K/V heads measured through {self.windows}' if self.windows else ''}"
        )

    def _left_out_text(self) -> str:
        """Return a last line of the table, or nothing."""
        tokens = self.left_out_tokens
        if not tokens:
            return ""
        named = ", ".join(f"{s} {n:,}" for s, n in tokens.items())
        return f"\nleft out, of length zero or not finite: {named}"

    def _of(self, statistic: str) -> Array:
        return np.asarray(self.statistics[:, :, PROBE_STATS.index(statistic)])

    def _sum(self, statistic: str) -> Array:
        return np.asarray(self._of(statistic).sum(axis=0))


def _check_variant(variant: str) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f"unknown variant {variant!r}: use 'paper' or 'released'")
