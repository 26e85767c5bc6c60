"""Files that survive a crash and say what is wrong with them; digests of what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


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


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`: whoever reads it, at any time, gets all of the old or of the new."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have the new name on disk before anything that relies on it follows."""
    with contextlib.suppress(OSError):  # not every system can; the content is in place anyway
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_document(
    path: Path, schema: int, keys: Sequence[str], error: type[ValueError], redo: str
) -> dict[str, Any]:
    """The JSON object in the file `path`, if it has `keys` and is of `schema`; else `error`."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as cause:
        raise error(f"{path}: no such file; check the path, or {redo}") from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); check the path") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: truncated or not JSON ({cause}); {redo}") from cause
    if not isinstance(data, dict) or type(data.get("schema")) is not int:
        raise error(f"{path}: no schema number, so not a file of this kind; check the path")
    if data["schema"] > schema:
        raise error(
            f"{path}: schema {data['schema']} is newer than this version reads ({schema}); "
            f"upgrade adaskip-fx, or {redo}"
        )
    missing = [key for key in keys if key not in data]
    if missing or data["schema"] != schema:
        what = f"missing {', '.join(missing)}" if missing else f"unknown schema {data['schema']}"
        raise error(f"{path}: {what}; {redo}")
    return data


def check_digest(
    path: Path, stored: object, content: str, error: type[ValueError], redo: str
) -> None:
    """Raise `error` when the file's own digest is not the digest of its content."""
    if stored != content:
        raise error(f"{path}: edited after it was saved (digest {stored} is {content} now); {redo}")
