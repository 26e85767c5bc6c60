"""`docs/explanation/private-interfaces.md` lists what of torch and transformers is not promised."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import cache_utils, configuration_utils, masking_utils, modeling_utils
from transformers.generation import configuration_utils as generation_configuration
from transformers.generation import utils as generation_utils
from transformers.integrations import moe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/explanation/private-interfaces.md").read_text("utf-8")
#: up to the first part with an underscore: ``torch._dynamo``, ``torch.fx._symbolic_trace``
_PRIVATE = re.compile(r"(?:torch|fx)(?:\.[a-zA-Z]\w*)*\._[a-zA-Z]\w*")
_UNDERSCORE = re.compile(r"_[a-zA-Z]\w*")
#: The modules of transformers whose classes adaskip_fx reads, overrides and calls.
_MODULES = (
    cache_utils,
    configuration_utils,
    generation_configuration,
    generation_utils,
    masking_utils,
    modeling_utils,
    moe,
)


def listed(section: str) -> dict[str, set[str]]:
    """By file, the interfaces that a section of the page names."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    return {file.strip(" `"): set(re.findall(r"`([^`]+)`", names)) for file, names in rows}


def found(scan: Callable[[str], Iterator[str]]) -> dict[str, set[str]]:
    """By file of both packages, what a scan finds; files where it finds nothing are left out."""
    files = [*(ROOT / "adaskip_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    names = {f.relative_to(ROOT).as_posix(): set(scan(f.read_text("utf-8"))) for f in files}
    return {file: used for file, used in names.items() if used}


# torch ------------------------------------------------------------------------------------------


def of_torch(source: str) -> Iterator[str]:
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
    assert listed("torch") == found(of_torch)


def test_the_scan_for_torch_sees_what_it_looks_for() -> None:
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
    assert set(of_torch(source)) == {*(f"torch.{name}" for name in names), "fx._lazy_graph_module"}


# transformers -----------------------------------------------------------------------------------


@functools.cache
def private_of_transformers() -> frozenset[str]:
    """Names with a leading underscore that transformers' own code has, and torch has not."""
    names = set[str]()
    for module in _MODULES:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(t.id for t in targets if isinstance(t, ast.Name))
    of_torch = {*dir(nn.Module()), *dir(torch.Tensor), *dir(torch)}
    return frozenset(filter(_UNDERSCORE.fullmatch, names - of_torch))


def of_transformers(source: str) -> Iterator[str]:
    """Private names of transformers' that code reads, calls, overrides, or has in a string."""
    tree = ast.parse(source)
    methods = {
        member.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for member in node.body
        if isinstance(member, ast.FunctionDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = {node.attr}
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant):  # of getattr, or an attribute to leave out
            names = {node.value} if isinstance(node.value, str) else set()
        else:
            continue
        yield from names & private_of_transformers()
    yield from methods & private_of_transformers()


def test_the_page_lists_what_of_transformers_is_used_where() -> None:
    assert listed("transformers") == found(of_transformers)


def test_the_scan_for_transformers_sees_what_it_looks_for() -> None:
    source = (
        "class Model:\n"
        "    def _sample(self): ...\n"
        "    def _other(self): ...\n"
        "def _prefill(): ...\n"
        "config._attn_implementation\n"
        'getattr(config, "_pad_token_tensor", None)\n'
        "super()._update_model_kwargs_for_generation()\n"
        "from transformers.generation.utils import _undo_generation_steps\n"
        "module._parameters\n"
        "cache._lease\n"
    )
    names = {"_sample", "_attn_implementation", "_pad_token_tensor"}
    late = {"_undo_generation_steps"} & private_of_transformers()  # since 5.23
    assert set(of_transformers(source)) == {*names, *late, "_update_model_kwargs_for_generation"}
