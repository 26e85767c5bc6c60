"""Which file a rank's share of a request's memory is in, where several ranks run one model.

Each rank has other K/V heads, so each writes a file of its own beside the others, named after it:
``prefix.0-of-2.safetensors``. In one process the file is the one that was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..parallel.ranks import Ranks
from ..utils.files import JSON, canonical_digest

_APART = "each has other K/V heads"


def file_of(path: Path, ranks: Ranks) -> Path:
    """Return the file of this rank's share."""
    if ranks.alone:
        return path
    return path.with_name(f"{path.stem}.{ranks.rank}-of-{ranks.size}{path.suffix}")


def facts(sha256: str, ranks: Ranks) -> dict[str, JSON]:
    """Return what the file of a share says of it; all ranks ask, and one process says nothing.

    Args:
        sha256: of the share.
        ranks: of the model.
    """
    if ranks.alone:
        return {}
    shares = ranks.each("the shares of a cache", lambda: sha256)
    return {"rank": ranks.rank, "ranks": ranks.size, "shares": canonical_digest(shares)}


def why_not_here(about: Mapping[str, Any], ranks: Ranks) -> str | None:
    """Return why a file is not this rank's share; None if it is."""
    rank, size = about.get("rank", 0), about.get("ranks", 1)
    if (rank, size) == (ranks.rank, ranks.size):
        return None
    whose = "one process" if size == 1 else f"rank {rank} of {size}"
    here = "in one process" if ranks.alone else f"rank {ranks.rank} of {ranks.size}"
    return f"saved by {whose}, and this model is {here}: {_APART}"


def why_missing(path: Path, ranks: Ranks) -> str | None:
    """Return what there is instead of this rank's share of the cache at a path; None if nothing."""
    if not ranks.alone and path.is_file():
        return f"saved by one process, and this model is on {ranks.size} ranks: {_APART}"
    name = re.compile(rf"{re.escape(path.stem)}\.\d+-of-(\d+){re.escape(path.suffix)}")
    try:
        found = [name.fullmatch(file.name) for file in path.parent.iterdir()]
    except OSError:
        found = []
    sizes = sorted({int(match[1]) for match in found if match} - {ranks.size})
    if not sizes:
        return None
    here = "in one process" if ranks.alone else f"on {ranks.size} ranks"
    saved = " or ".join(map(str, sizes))
    return f"saved on {saved} ranks, and this model is {here}: {_APART}"
