"""Paths that pages name in backticks exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_PATH = re.compile(r"`((?:adaskip_fx|passes|tests|benchmarks|docs|examples)/[\w./-]*)`")


def missing(text: str) -> list[str]:
    """The paths in a page's text that are not there."""
    return [path for path in _PATH.findall(text) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_exist(page: Path) -> None:
    assert not missing(page.read_text("utf-8"))


def test_a_path_that_is_not_there_is_found() -> None:
    assert missing("see `docs/index.md` and `adaskip_fx/nowhere.py`") == ["adaskip_fx/nowhere.py"]
    assert missing("see `adaskip_fx/nowhere/`") == ["adaskip_fx/nowhere/"]
