"""Paths that pages name in backticks exist, and the page about the code names every folder."""

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


def test_every_folder_is_named() -> None:
    named = set(_PATH.findall((ROOT / "docs/explanation/code.md").read_text("utf-8")))
    packages = ROOT / "adaskip_fx", ROOT / "passes/adaskip_passes"
    inits = (init for package in packages for init in package.glob("*/__init__.py"))
    folders = {f"{init.parent.relative_to(ROOT).as_posix()}/" for init in inits}
    assert len(folders) > 20
    assert not folders - named
