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


#: Torch takes seconds to import, so one process tells what each line brings in.
STEPS = """
def tell(*names): print([name in sys.modules for name in names], flush=True)
import adaskip_passes
tell("torch")
from adaskip_passes.errors import AdaskipError
from adaskip_passes import UnsupportedError
tell("torch")
from adaskip_passes import Skip
tell("torch", "adaskip_passes.decode.cuda_kernels")
import adaskip_passes.decode.ops
tell("adaskip_passes.decode.cuda_kernels")
for name in adaskip_passes.__all__: getattr(adaskip_passes, name)
tell(*(m for m in sys.modules if m.partition(".")[0] in ("transformers", "adaskip_fx")))
"""


def test_what_is_imported_when() -> None:
    """Torch when it is needed, kernels with their operators, and nothing that is not installed."""
    done = run(STEPS)
    assert done.returncode == 0, done.stderr
    bare, errors, skip, operators, others = done.stdout.splitlines()
    assert (bare, errors) == ("[False]", "[False]")
    assert (skip, operators) == ("[True, False]", "[True]")
    assert others == "[]"


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
    kernels = "adaskip_passes.decode.triton_kernels"
    users = graph.find_modules_that_directly_import("triton")
    assert {user for user in users if not user.startswith(f"{kernels}.")} == {
        "adaskip_passes.attention.triton_kernels.merge",
        "adaskip_passes.attention.triton_kernels.tiles",
        "adaskip_passes.grouped_experts.triton_kernels.rows",
        "adaskip_passes.windows.triton_kernels",
    }
    assert f"{kernels}.decode_attention" in users


def test_the_public_names() -> None:
    """What adaskip_fx builds on; a change here is a change of the package's interface."""
    assert adaskip_passes.__all__ == [
        "AdaskipError",
        "FuseProjections",
        "FuseRankSums",
        "Pass",
        "PassResult",
        "PieceCompiler",
        "Probe",
        "Recorder",
        "Recording",
        "Replacement",
        "Skip",
        "Tap",
        "UnsupportedError",
        "canonicalize",
        "capture",
        "find_sublayers",
        "fuse",
        "link",
        "outline",
        "run_passes",
    ]
    assert set(adaskip_passes.__all__) <= set(dir(adaskip_passes))


def test_no_public_name_is_that_of_a_submodule() -> None:
    """Importing the submodule would put it where the name belongs."""
    submodules = {path.stem for path in PACKAGE.iterdir()}
    assert "errors" in submodules
    assert not submodules & set(adaskip_passes.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    message = r"^module 'adaskip_passes' has no attribute 'nothing'$"
    with pytest.raises(AttributeError, match=message):
        adaskip_passes.nothing  # noqa: B018


def test_the_old_name_of_unsupported_error_is_still_there() -> None:
    assert adaskip_passes.RefusedError is adaskip_passes.UnsupportedError
