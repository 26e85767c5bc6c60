"""Data files of question answering: a JSON list, or one JSON object a line, also gzipped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return all objects of a ``.json`` list, or of a ``.jsonl`` file; either may end in ``.gz``.

    Raises:
        ValueError: says which line is not what it should be.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    records = _parsed(path, text, lines=".jsonl" in path.suffixes)
    if not records or not all(isinstance(r, dict) for r in records):
        raise ValueError(f"{path}: expected JSON objects, one a line (.jsonl) or a list of them")
    return records


def _parsed(path: Path, text: str, lines: bool) -> list[Any]:
    if not lines:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        return value if isinstance(value, list) else []
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
    return records


def invalid_record(path: Path, number: int, what: str) -> ValueError:
    """Return the error of a record that is not what it should be."""
    return ValueError(f"{path}: record {number} should have {what}")


def answers_of(path: Path, number: int, record: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return the texts under `key`, which may be one text.

    Raises:
        ValueError: there is none.
    """
    value = record.get(key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise invalid_record(path, number, f"a text, or a list of texts, under {key!r}")
    return tuple(texts)


def text_of(path: Path, number: int, record: dict[str, Any], key: str) -> str:
    """Return the text under `key`.

    Raises:
        ValueError: there is none.
    """
    value = record.get(key)
    if not isinstance(value, str):
        raise invalid_record(path, number, f"a text under {key!r}")
    return value
