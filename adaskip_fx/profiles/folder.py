"""A profile as a folder: `profile.json`, and the file of tensors that it names."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.numpy

from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.profiles.fingerprint import Fingerprint
from adaskip_fx.profiles.head_windows import HeadWindows
from adaskip_fx.profiles.validation import Array, ProfileError
from adaskip_fx.utils.files import (
    JSON,
    canonical_digest,
    check_digest,
    read_document,
    write_atomically,
)

if TYPE_CHECKING:
    from adaskip_fx.profiles.profile import Profile

SCHEMA = 1
_DOCUMENT = "profile.json"
_KEYS = ("digest", "fingerprint", "sublayers", "versions", "calibration", "tensors")
_TENSOR_FILE = re.compile(r"moments-[0-9a-f]{16}\.safetensors")
_TEMPORARY = re.compile(r"\.(profile\.json|moments-[0-9a-f]{16}\.safetensors)\.[0-9a-f]{8}\.tmp")
_REDO = "calibrate again"


def digest_of(profile: Profile) -> str:
    """Return 16 hex characters that identify the content of a profile."""
    return canonical_digest({**_about(profile), "moments": _sha256(_tensor_bytes(profile))})


def save(profile: Profile, folder: Path) -> None:
    """Write a profile to `folder`; see `Profile.save`."""
    check_target(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensor_bytes(profile)
    sha256 = _sha256(tensors)
    name = f"moments-{sha256[:16]}.safetensors"
    document = {
        "schema": SCHEMA,
        "digest": profile.digest,
        **_about(profile),
        "tensors": {"file": name, "sha256": sha256},
    }
    write_atomically(folder / name, tensors)
    write_atomically(folder / _DOCUMENT, json.dumps(document, indent=1).encode())
    _remove_leftovers(folder, keep=name)


def load(profile_type: type[Profile], folder: Path) -> Profile:
    """Return the profile that was saved to `folder`, made by `profile_type`.

    Raises:
        ProfileError: the message says which file, what is wrong and what to do.
    """
    if not folder.is_dir():
        raise ProfileError(f"{folder}: no such folder; check the path, or {_REDO}")
    document = folder / _DOCUMENT
    data = read_document(document, SCHEMA, _KEYS, ProfileError, _REDO)
    tensors = _read_tensors(folder, data["tensors"])
    try:
        profile = profile_type(
            tuple(map(Sublayer.parse, data["sublayers"])),
            tensors["moments"],
            Fingerprint(**data["fingerprint"]),
            data["versions"],
            data["calibration"],
            tensors.get("layers"),
            tensors.get("left_out"),
            HeadWindows.from_json(data["windows"], tensors["windows"])
            if "windows" in data
            else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{document}: not a valid profile ({error}); {_REDO}") from error
    check_digest(document, data["digest"], profile.digest, ProfileError, _REDO)
    return profile


def check_target(folder: Path) -> None:
    """Refuse to save a profile where something else is.

    Raises:
        ProfileError: the message says what is there.
    """
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


def _about(profile: Profile) -> dict[str, JSON]:
    return {
        "fingerprint": asdict(profile.fingerprint),
        "sublayers": [str(s) for s in profile.sublayers],
        "versions": dict(profile.versions),
        "calibration": dict(profile.calibration),
        **({"windows": profile.windows.to_json()} if profile.windows is not None else {}),
    }


def _tensor_bytes(profile: Profile) -> bytes:
    windows = profile.windows.statistics if profile.windows is not None else None
    optional = {"layers": profile.layers, "left_out": profile.left_out, "windows": windows}
    measured = {name: tensor for name, tensor in optional.items() if tensor is not None}
    return bytes(safetensors.numpy.save({"moments": profile.statistics, **measured}))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise ProfileError(f"{file}: holds no moments ({error}); {_REDO}") from error
