"""The import arrow: adaskip_passes needs torch alone, and torch's private parts in two files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adaskip_passes

PACKAGE = Path(adaskip_passes.__file__).parent
FILES = sorted(PACKAGE.glob("**/*.py"))
FORBIDDEN = ("transformers", "adaskip_fx", "numpy", "safetensors", "typer", "rich")
NEEDS_TRITON = {"decode_kernels.py"}  # comes with torch where there is a GPU; imported at use
PRIVATE = {"dynamo.py", "compiler.py", "versions.py"}  # may use what torch does not promise

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


def imported(source: str) -> Iterator[str]:
    """Every module that a file imports, as ``torch._dynamo``; names of ``from`` imports as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def private(source: str) -> list[str]:
    """The parts of torch with a leading underscore that a file imports or reaches through."""
    found = [name for name in imported(source) if name.startswith("torch") and "._" in name]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            dotted = ast.unparse(node)
            if dotted.startswith(("torch.", "fx.")) and not node.attr.endswith("__"):
                found.append(dotted)
    return found


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


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_no_file_imports_what_it_must_not(file: Path) -> None:
    """Also not inside functions, where importing the package would not show it."""
    roots = {name.partition(".")[0] for name in imported(file.read_text())}
    assert not roots & set(FORBIDDEN)
    known = {"torch", "adaskip_passes"} | set(sys.stdlib_module_names)
    if file.name in NEEDS_TRITON:
        known |= {"triton"}
    assert roots <= known


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_private_parts_of_torch_are_used_in_few_files(file: Path) -> None:
    found = private(file.read_text())
    assert found == [] or file.name in PRIVATE


def test_the_scans_see_what_they_look_for() -> None:
    source = (
        "import torch._dynamo\n"
        "from torch._guards import tracing\n"
        "def late():\n"
        "    from transformers import AutoModel\n"
        "    return torch._C.nothing\n"
    )
    assert {n.partition(".")[0] for n in imported(source)} == {"torch", "transformers"}
    assert private(source) == ["torch._dynamo", "torch._guards.tracing", "torch._C"]
    assert private((PACKAGE / "dynamo.py").read_text())
    assert {f.name for f in FILES} > PRIVATE


def test_the_public_names() -> None:
    """What adaskip_fx builds on; a change here is a change of the package's interface."""
    assert sorted(adaskip_passes.__all__) == sorted(set(adaskip_passes.__all__))
    assert {
        "Capture",
        "Piece",
        "PieceCompiler",
        "Probe",
        "RefusedError",
        "Replacement",
        "ShapeGuards",
        "Skip",
        "Sublayer",
        "capture",
        "eliminate_dead_code",
        "find_sublayers",
        "fuse",
        "link",
        "outline",
        "run_passes",
        "text",
    } <= set(adaskip_passes.__all__)
