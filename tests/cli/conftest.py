"""A tiny model in a folder, a profile of it and a plan, as the command line is given them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import Result

import adaskip_fx
from adaskip_fx.plans.surrogates import Surrogates
from tests.support.command_line import SUBLAYERS, run, save


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def calibrated(folder: Path) -> tuple[Path, Result]:
    """A profile made by the command, and what it printed."""
    out = folder.parent / "tiny.adaskip"
    return out, run("calibrate", folder, out, "--max-length", 64, "--samples", 3)


@pytest.fixture
def profile(calibrated: tuple[Path, Result]) -> Path:
    return calibrated[0]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Attention 0 is skipped, and ffn 1 in decode as well."""
    file = tmp_path / "plan.json"
    scale = Surrogates.scale({SUBLAYERS[0]: 1.05})
    adaskip_fx.SkipPlan.of(
        SUBLAYERS, ["0.attention"], decode_extra=["1.ffn"], surrogates=scale
    ).save(file)
    return file
