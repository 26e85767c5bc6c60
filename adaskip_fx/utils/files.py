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
    """Return 16 hex characters of the sha256 of `value`.

    They are the same for equal values on every machine. Key order does not count. Floats enter by
    `float.hex`: no rounding, no formatting rules.
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
    """Write `data` to `path`, so that a reader at any time gets all of the old or of the new."""
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


def check_file_target(path: Path, content: str) -> None:
    """Refuse a path that no file can be written to.

    Args:
        path: where the file is to be.
        content: what it will be, for the message: ``a plan``.

    Raises:
        ValueError: the path is a folder, or in a folder that does not exist.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"{path}: {content} is a file in a folder that exists; choose another path"
        )


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the content of a text file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text in that encoding; says at which byte.
    """
    try:
        return path.read_text(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not {encoding.upper()} text ({error.reason} at byte {error.start})"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Flush the new name to disk before anything that relies on it follows."""
    with contextlib.suppress(OSError):  # not every system can; the content is in place anyway
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_document(
    path: Path, schema: int, keys: Sequence[str], error: type[ValueError], redo: str
) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        schema: the number of the schema that it must have.
        keys: what it must hold.
        error: the class of what is raised where it does not.
        redo: what to do then, for the message.

    Raises:
        ValueError: an `error` that says what is wrong with which file and what to do.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as cause:
        raise error(f"{path}: no such file; check the path, or {redo}") from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); check the path") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: truncated or not JSON ({cause}); {redo}") from cause
    return check_document(path, data, schema, keys, error, redo)


def check_document(
    source: Path | str,
    data: object,
    schema: int,
    keys: Sequence[str],
    error: type[ValueError],
    redo: str,
) -> dict[str, Any]:
    """Return `data` if it is the object that was wanted; see `read_document`.

    Args:
        source: the file or place that it is from, for the message.
        data: what was read.
        schema: the number of the schema that it must have.
        keys: what it must hold.
        error: the class of what is raised where it does not.
        redo: what to do then, for the message.

    Raises:
        ValueError: an `error` that says what is wrong with which file and what to do.
    """
    if not isinstance(data, dict) or type(data.get("schema")) is not int:
        raise error(f"{source}: no schema number, so not a file of this kind; check the path")
    if data["schema"] > schema:
        raise error(
            f"{source}: schema {data['schema']} is newer than this version reads ({schema}); "
            f"upgrade adaskip-fx, or {redo}"
        )
    missing = [key for key in keys if key not in data]
    if missing or data["schema"] != schema:
        what = f"missing {', '.join(missing)}" if missing else f"unknown schema {data['schema']}"
        raise error(f"{source}: {what}; {redo}")
    return data


def check_digest(
    path: Path | str, stored: object, content: str, error: type[ValueError], redo: str
) -> None:
    """Raise `error` when the file's own digest is not the digest of its content."""
    if stored != content:
        raise error(f"{path}: edited after it was saved (digest {stored} is {content} now); {redo}")
