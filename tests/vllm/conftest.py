"""Tests inside of vLLM: `make test-vllm` runs them in an environment of its own."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.vllm import engines, models

    os.environ.update({k: os.environ.get(k, v) for k, v in engines.SETTINGS.items()})


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> models.Folders:
    """Saved models of random weights, by family."""
    return models.Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True, scope="session")
def cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What vLLM and torch compile is kept for this run alone."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["VLLM_CACHE_ROOT"] = str(path / "vllm")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path / "inductor")
    return path
