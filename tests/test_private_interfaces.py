"""`docs/explanation/private-interfaces.md` lists what of torch and transformers is not promised."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/explanation/private-interfaces.md").read_text("utf-8")
#: up to the first part with an underscore: ``torch._dynamo``, ``torch.fx._symbolic_trace``
_PRIVATE = re.compile(r"(?:torch|fx)(?:\.[a-zA-Z]\w*)*\._[a-zA-Z]\w*")


def listed(section: str) -> dict[str, set[str]]:
    """By file, the interfaces that a section of the page names."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    return {file.strip(" `"): set(re.findall(r"`([^`]+)`", names)) for file, names in rows}


def used(source: str) -> Iterator[str]:
    """Parts of torch with a leading underscore that code names, also as a string to import."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            texts = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            texts = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            texts = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
        else:
            continue
        yield from (m[0] for t in texts if (m := _PRIVATE.match(str(t))))


def test_the_page_lists_what_of_torch_is_used_where() -> None:
    files = [*(ROOT / "adaskip_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    found = {f.relative_to(ROOT).as_posix(): set(used(f.read_text("utf-8"))) for f in files}
    assert listed("torch") == {file: names for file, names in found.items() if names}


@pytest.mark.parametrize("file", listed("transformers"))
def test_the_page_lists_what_of_transformers_is_used_where(file: str) -> None:
    source = (ROOT / file).read_text("utf-8")
    missing = {n for n in listed("transformers")[file] if not re.search(rf"\b{n}\b", source)}
    assert not missing


def test_the_scan_sees_what_it_looks_for() -> None:
    source = (
        "import torch._dynamo\n"
        "from torch._guards import tracing\n"
        "from torch import _inductor\n"
        "def late():\n"
        '    importlib.import_module("torch._higher_order_ops.scan")\n'
        "    return torch._C.nothing\n"
        "torch.utils._pytree.tree_map\n"
        "fx._lazy_graph_module\n"
        "torch.__version__\n"
    )
    names = {"_dynamo", "_guards", "_inductor", "_higher_order_ops", "_C", "utils._pytree"}
    found = {*(f"torch.{name}" for name in names), "fx._lazy_graph_module"}
    assert set(used(source)) == found
