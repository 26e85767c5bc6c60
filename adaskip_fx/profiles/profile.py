"""Profiles: what calibration measured on a model, as plain numbers with a fingerprint.

Only sums are kept (per sample and sublayer), so that every average of the paper and of its
released code can be formed later without running the model again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from adaskip_fx.plans.skip_plan import TIMES, layer_table
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import SANE_FACTORS, Surrogates
from adaskip_fx.profiles.fingerprint import Fingerprint, fingerprint
from adaskip_fx.utils.files import (
    JSON,
    canonical_digest,
    check_digest,
    read_document,
    write_atomically,
)
from adaskip_passes.errors import AdaskipError

if TYPE_CHECKING:
    pass

__all__ = ["PROBE_STATS", "Fingerprint", "Profile", "ProfileError", "Variant", "fingerprint"]

PROBE_STATS = ("cosine", "ratio", "before_squared", "after_squared", "tokens")
SCHEMA = 1
Variant = Literal["paper", "released"]
Array = npt.NDArray[np.float64]

_DOCUMENT = "profile.json"
_KEYS = ("digest", "fingerprint", "sublayers", "versions", "calibration", "tensors")
_TENSOR_FILE = re.compile(r"moments-[0-9a-f]{16}\.safetensors")
_TEMPORARY = re.compile(r"\.(profile\.json|moments-[0-9a-f]{16}\.safetensors)\.[0-9a-f]{8}\.tmp")
_REDO = "calibrate again"


class ProfileError(AdaskipError, ValueError):
    """A profile that is damaged, impossible, or of another model."""


@dataclass(frozen=True, eq=False)
class Profile:
    """What calibration measured. Immutable, hashable, equal by content.

    sublayers: all of the model's, in stream order.
    moments: float64 [samples, sublayers, 5], sums over the valid tokens of each sample of
        `PROBE_STATS`: cos(a, b); |b| / |a|; |a|^2; |b|^2; 1 (a and b: the residual stream before
        and after the sublayer). A token with a or b of length zero or not finite is in none.
        Copied and read-only.
    fingerprint: the model; versions: of the libraries used; calibration: a description of the
        texts, anything that JSON can hold.
    layers: float64 [samples, layers, 5], the same of whole layers, before their first sublayer and
        after their last; None in profiles of versions that did not measure them.
    left_out: float64 [samples, sublayers], how many valid tokens are not in the moments; None
        where all are.

    ProfileError for a wrong shape, a moment that is not finite, or a sublayer without tokens.
    """

    sublayers: tuple[Sublayer, ...]
    moments: Array
    fingerprint: Fingerprint
    versions: Mapping[str, str]
    calibration: Mapping[str, JSON]
    layers: Array | None = None
    left_out: Array | None = None

    def __post_init__(self) -> None:
        moments = _frozen(self.moments)
        object.__setattr__(self, "sublayers", tuple(self.sublayers))
        object.__setattr__(self, "moments", moments)
        for name in ("versions", "calibration"):
            object.__setattr__(self, name, _json_copy(name, getattr(self, name)))
        _check_moments(self.sublayers, moments)
        if self.layers is not None:
            layers = _frozen(self.layers)
            object.__setattr__(self, "layers", layers)
            _check_layers(self.layer_numbers, layers, len(moments))
        if self.left_out is not None:
            left_out = _frozen(self.left_out)
            _check_left_out(left_out, moments)
            object.__setattr__(self, "left_out", left_out if left_out.any() else None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can be neither pickled nor deep-copied.
        about = (self.fingerprint, dict(self.versions), dict(self.calibration))
        return Profile, (self.sublayers, self.moments, *about, self.layers, self.left_out)

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the content."""
        return canonical_digest({**self._about(), "moments": _sha256(self._tensor_bytes())})

    @property
    def tokens(self) -> int:
        """Valid tokens over all samples, those that a sublayer's moments leave out as well."""
        left_out = 0.0 if self.left_out is None else self.left_out[:, 0].sum()
        return round(float(self._sum("tokens")[0] + left_out))

    @property
    def left_out_tokens(self) -> Mapping[Sublayer, int]:
        """Of each sublayer, where it is not 0, how many tokens its moments leave out."""
        if self.left_out is None:
            return {}
        sums = zip(self.sublayers, self.left_out.sum(axis=0).tolist(), strict=True)
        return {s: round(n) for s, n in sums if n}

    def similarity(self, variant: Variant = "paper") -> Array:
        """[sublayers]: mean cosine of the stream before and after each sublayer.

        `"paper"`: over all tokens (eq. 2). `"released"`: per sample, then over samples.
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
        """[layers]: mean cosine, over all tokens, of the stream before and after each layer.

        1 minus it is ShortGPT's block influence (arXiv 2403.03853, eq. 1).

        ProfileError for a profile of a version that did not measure layers.
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
        """[sublayers]: the factor that stands in for each sublayer, no unit.

        `"paper"`: mean of |b| / |a| over all tokens (eq. 3). `"released"`: the ratio of
        whole-sample norms, sqrt(sum |b|^2 / sum |a|^2), averaged over samples.
        """
        _check_variant(variant)
        if variant == "paper":
            return self._sum("ratio") / self._sum("tokens")
        with np.errstate(divide="ignore", invalid="ignore"):  # `surrogates` names the sublayer
            ratio = self._of("after_squared") / self._of("before_squared")
        return np.asarray(np.sqrt(ratio).mean(axis=0))

    def scales(self, variant: Variant = "paper") -> Surrogates:
        """`scale` of every sublayer as its surrogate.

        ProfileError, naming the sublayer, for a factor outside of `SANE_FACTORS`: a plan with it
        would compute nothing of use, so `compile` does not get as far as that.
        """
        factors = dict(zip(self.sublayers, self.scale(variant).tolist(), strict=True))
        least, most = SANE_FACTORS
        for sublayer, factor in factors.items():
            if not least <= factor <= most:
                raise ProfileError(
                    f"scale factor of {sublayer} is {factor:.3g} in this profile, and none outside "
                    f"of {least:g} to {most:g} can stand in for a sublayer: the stream of some "
                    "token was almost zero, or grew beyond measure. Calibrate again, on texts "
                    "without padding or unknown tokens, or in a wider dtype"
                )
        return Surrogates.scale(factors)

    def check(self, model: Any) -> None:
        """ProfileError when `model` is of another architecture than the one measured."""
        actual = fingerprint(model)
        if actual.digest != self.fingerprint.digest:
            raise ProfileError(
                f"this profile was measured on {self.fingerprint}, but the model is {actual}; "
                "load the profile of this model, or calibrate it"
            )

    def save(self, path: str | Path) -> None:
        """Write the folder `path`: `profile.json` and the tensor file that it names.

        A crash at any point leaves the old profile or the new one, whole. One writer at a time.
        ProfileError when `path` is a file or a folder that holds something else.
        """
        folder, tensors = Path(path), self._tensor_bytes()
        check_target(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sha256 = _sha256(tensors)
        name = f"moments-{sha256[:16]}.safetensors"
        document = {
            "schema": SCHEMA,
            "digest": self.digest,
            **self._about(),
            "tensors": {"file": name, "sha256": sha256},
        }
        write_atomically(folder / name, tensors)
        write_atomically(folder / _DOCUMENT, json.dumps(document, indent=1).encode())
        _remove_leftovers(folder, keep=name)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a saved profile; ProfileError says which file, what is wrong and what to do."""
        folder = Path(path)
        if not folder.is_dir():
            raise ProfileError(f"{folder}: no such folder; check the path, or {_REDO}")
        document = folder / _DOCUMENT
        data = read_document(document, SCHEMA, _KEYS, ProfileError, _REDO)
        tensors = _read_tensors(folder, data["tensors"])
        try:
            profile = cls(
                tuple(map(Sublayer.parse, data["sublayers"])),
                tensors["moments"],
                Fingerprint(**data["fingerprint"]),
                data["versions"],
                data["calibration"],
                tensors.get("layers"),
                tensors.get("left_out"),
            )
        except (TypeError, ValueError) as error:
            raise ProfileError(f"{document}: not a valid profile ({error}); {_REDO}") from error
        check_digest(document, data["digest"], profile.digest, ProfileError, _REDO)
        return profile

    def __str__(self) -> str:
        """A heading and one row per layer: similarity, then the scale in parentheses.

        Then, where there are any, what is left out of these means.
        """
        similarity = dict(zip(self.sublayers, self.similarity(), strict=True))
        scale = dict(zip(self.sublayers, self.scale(), strict=True))
        table = layer_table(
            self.sublayers, lambda s: f"{similarity[s]:.4f} ({TIMES}{scale[s]:.4f})", " similarity"
        )
        return (
            f"Profile {self.digest[:8]}: {self.fingerprint.model_type}, {self.tokens:,} tokens "
            f"in {len(self.moments)} samples\n{table}{self._left_out_text()}"
        )

    def _left_out_text(self) -> str:
        """A last line of the table, or nothing."""
        tokens = self.left_out_tokens
        if not tokens:
            return ""
        named = ", ".join(f"{s} {n:,}" for s, n in tokens.items())
        return f"\nleft out, of length zero or not finite: {named}"

    def _of(self, moment: str) -> Array:
        return np.asarray(self.moments[:, :, PROBE_STATS.index(moment)])

    def _sum(self, moment: str) -> Array:
        return np.asarray(self._of(moment).sum(axis=0))

    def _about(self) -> dict[str, JSON]:
        return {
            "fingerprint": asdict(self.fingerprint),
            "sublayers": [str(s) for s in self.sublayers],
            "versions": dict(self.versions),
            "calibration": dict(self.calibration),
        }

    def _tensor_bytes(self) -> bytes:
        more = {"layers": self.layers, "left_out": self.left_out}
        known = {name: tensor for name, tensor in more.items() if tensor is not None}
        return bytes(safetensors.numpy.save({"moments": self.moments, **known}))


def _frozen(values: Any) -> Array:
    """A copy that cannot be written to."""
    copied: Array = np.array(values, dtype=np.float64, order="C")
    copied.flags.writeable = False
    return copied


def _check_variant(variant: str) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f"unknown variant {variant!r}: use 'paper' or 'released'")


def _check_moments(sublayers: tuple[Sublayer, ...], moments: Array) -> None:
    expected = f"[samples, {len(sublayers)} sublayers, {len(PROBE_STATS)}]"
    if moments.ndim != 3 or moments.shape[1:] != (len(sublayers), len(PROBE_STATS)):
        raise ProfileError(f"moments have shape {list(moments.shape)}, expected {expected}")
    if not moments.size:
        raise ProfileError(f"moments are empty: at least one sample of {expected} is needed")
    not_finite = ~np.isfinite(moments).all(axis=2)
    no_tokens = moments[:, :, PROBE_STATS.index("tokens")] <= 0
    for bad, what in ((not_finite, "not finite"), (no_tokens, "no tokens")):
        if bad.any():
            sample, sublayer = np.argwhere(bad)[0]
            raise ProfileError(f"{sublayers[sublayer]}: {what} in sample {sample}")


def _check_layers(numbers: tuple[int, ...], layers: Array, samples: int) -> None:
    if layers.shape != (samples, len(numbers), len(PROBE_STATS)):
        raise ProfileError(
            f"layers have shape {list(layers.shape)}, expected "
            f"[{samples} samples, {len(numbers)} layers, {len(PROBE_STATS)}]"
        )
    bad = ~np.isfinite(layers).all(axis=2) | (layers[:, :, PROBE_STATS.index("tokens")] <= 0)
    if bad.any():
        sample, place = np.argwhere(bad)[0]
        raise ProfileError(f"layer {numbers[place]}: not finite, or no tokens, in sample {sample}")


def _check_left_out(left_out: Array, moments: Array) -> None:
    if left_out.shape != moments.shape[:2]:
        raise ProfileError(
            f"left_out has shape {list(left_out.shape)}, expected {list(moments.shape[:2])}, "
            "[samples, sublayers]"
        )
    if not (np.isfinite(left_out) & (left_out >= 0)).all():
        raise ProfileError("left_out has a number that is negative or not finite")


def _json_copy(name: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return MappingProxyType(dict(json.loads(json.dumps(dict(value), allow_nan=False))))
    except (TypeError, ValueError) as error:
        raise ProfileError(f"{name} must be an object that JSON can hold: {error}") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Folder ----------------------------------------------------------------------------------------


def check_target(folder: Path) -> None:
    """Refuse to save a profile where something else is: ProfileError says what is there."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ProfileError(f"{folder}: is a file, but a profile is a folder; choose another path")
    names = [entry.name for entry in folder.iterdir()]
    # Our own files without a document are what a crash during the first save leaves.
    foreign = [n for n in names if not (_TENSOR_FILE.fullmatch(n) or _TEMPORARY.fullmatch(n))]
    if foreign and _DOCUMENT not in names:
        raise ProfileError(
            f"{folder}: holds other files ({min(foreign)}) and no {_DOCUMENT}; "
            "choose a new or empty folder"
        )


def _remove_leftovers(folder: Path, keep: str) -> None:
    for entry in folder.iterdir():
        ours = _TENSOR_FILE.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name)
        if ours and entry.name != keep:
            with contextlib.suppress(OSError):  # the profile is saved; the next save tries again
                entry.unlink()


def _read_tensors(folder: Path, named: Any) -> dict[str, Array]:
    name = named.get("file") if isinstance(named, dict) else None
    if not isinstance(name, str) or not _TENSOR_FILE.fullmatch(name):  # never outside the folder
        raise ProfileError(f"{folder / _DOCUMENT}: does not name its tensor file; {_REDO}")
    file = folder / name
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ProfileError(
            f"{file}: cannot be read ({error.strerror}); copy the whole folder again, or {_REDO}"
        ) from error
    if _sha256(data) != named.get("sha256"):
        raise ProfileError(
            f"{file}: truncated or edited (its sha256 is not the one in {_DOCUMENT}); "
            f"copy the whole folder again, or {_REDO}"
        )
    try:
        tensors = safetensors.numpy.load(data)
        return {"moments": tensors.pop("moments"), **tensors}
    except Exception as error:  # safetensors has an exception of its own, a plain Exception
        raise ProfileError(f"{file}: holds no moments ({error}); {_REDO}") from error
