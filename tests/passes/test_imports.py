"""The passes need torch alone. (Who may import whom is checked by `make lint`.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

import adaskip_passes

PACKAGE = Path(adaskip_passes.__file__).parent

BLOCKED = f"""
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"transformers", "adaskip_fx"}}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {str(PACKAGE.parent)!r})
"""


def run(source: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + source]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_imports_where_nothing_else_is_installed() -> None:
    done = run(
        "import adaskip_passes\n"
        "for name in adaskip_passes.__all__: getattr(adaskip_passes, name)\n"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in "
        "('transformers', 'adaskip_fx')))\n"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("name", ["transformers", "adaskip_fx"])
def test_the_hook_of_that_test_blocks(name: str) -> None:
    done = run(f"import {name}\n")
    assert done.returncode == 1
    assert f"blocked: {name}" in done.stderr


def test_no_file_imports_anything_else() -> None:
    """Also not inside functions. (Triton comes with torch where there is a GPU.)"""
    graph = grimp.build_graph("adaskip_passes", include_external_packages=True, cache_dir=None)
    foreign = {name for name in graph.modules if graph.is_module_squashed(name)}
    assert foreign - sys.stdlib_module_names == {"torch", "triton"}
    assert {"ast", "functools"} & foreign, "the standard library is among what it sees"
    (user,) = graph.find_modules_that_directly_import("triton")
    assert user == "adaskip_passes.decode.triton_kernels"


def test_the_public_names() -> None:
    """What adaskip_fx builds on; a change here is a change of the package's interface."""
    assert sorted(adaskip_passes.__all__) == sorted(set(adaskip_passes.__all__))
    assert {
        "Capture",
        "Piece",
        "PieceCompiler",
        "Probe",
        "UnsupportedError",
        "Replacement",
        "ShapeGuards",
        "Skip",
        "ResidualBranch",
        "capture",
        "eliminate_dead_code",
        "find_sublayers",
        "fuse",
        "link",
        "outline",
        "run_passes",
        "text",
    } <= set(adaskip_passes.__all__)
