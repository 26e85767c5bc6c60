"""What pictures are drawn from: result files, saved profiles and plan files, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .style import PlotError

Document = dict[str, Any]


def load(path: Path) -> Document:
    """One file as a document; it remembers where it came from under ``"path"``.

    A profile's folder becomes one row of a similarity picture, a plan file one plan of a plan map,
    a bare JSON list the points of a Pareto picture.

    Raises:
        PlotError: it cannot be read, or is none of these.
    """
    if path.is_dir():
        return {"path": str(path), "rows": [_profile_row(path)]}
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise PlotError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise PlotError(f"{path}: cannot be read as JSON ({error}); check the path") from None
    if isinstance(data, list):
        data = {"points": data}
    if not isinstance(data, dict):
        raise PlotError(f"{path}: holds neither an object nor a list; check the path")
    if {"sublayers", "prefill", "decode"} <= data.keys():
        data = {"plans": [{"name": path.stem, **data}]}
    return {**data, "path": str(path)}


def items(documents: Sequence[Document], key: str, needs: Sequence[str], how: str) -> list[Any]:
    """The entries of `key` of all documents, each with what it `needs`.

    Raises:
        PlotError: something is missing; `how` says what writes such a file.
    """
    found: list[Any] = []
    for document in documents:
        entries = document.get(key)
        if not isinstance(entries, list) or not entries:
            raise PlotError(f"{document['path']}: no {key!r} to draw; {how}")
        for number, entry in enumerate(entries):
            missing = [n for n in needs if not isinstance(entry, Mapping) or n not in entry]
            if missing:
                raise PlotError(
                    f"{document['path']}: entry {number} of {key!r} has no {missing[0]!r}; {how}"
                )
        found += entries
    return found


def place(documents: Sequence[Document]) -> str:
    """Model and device of the documents, for a title; empty where they do not say."""
    said = dict.fromkeys(
        ", ".join(filter(None, (_model(d), d.get("conditions", {}).get("device"))))
        for d in documents
    )
    return "; ".join(filter(None, said))


def _model(document: Document) -> str | None:
    model = document.get("model")
    return model.get("name") if isinstance(model, Mapping) else None


def _profile_row(path: Path) -> Document:
    """Mean similarity of each sublayer, and how much its mean differs between samples."""
    from adaskip_fx.profiles.profile import PROBE_STATS, Profile, ProfileError

    try:
        profile = Profile.load(path)
    except ProfileError as error:
        raise PlotError(str(error)) from None
    cosine, tokens = (profile.statistics[:, :, PROBE_STATS.index(m)] for m in ("cosine", "tokens"))
    low, high = np.quantile(cosine / tokens, (0.1, 0.9), axis=0)
    return {
        "name": path.stem,
        "sublayers": [str(s) for s in profile.sublayers],
        "mean": profile.similarity().tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }
