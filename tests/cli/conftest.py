"""A tiny model in a folder, as the command line is given it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command_line import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))
