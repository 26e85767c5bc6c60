"""`docs/refusals.md` and what the code raises say the same."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaskip_fx.kv_cache.cache import REFUSED
from tests.machine.refusals import DOCUMENT, is_listed, listed

_ROOT = DOCUMENT.parents[1]
#: where calls of a compiled model are refused
_CALLED = (
    *("model/compiled_model", "model/generation", "capture/states"),
    *("runtime/runtime", "runtime/step", "runtime/inputs"),
    *("kv_cache/cache", "kv_cache/layers", "kv_cache/adopt_cache", "kv_cache/saved"),
)
_REFUSALS = (
    *("UnsupportedError", "ChangedError", "SavedCacheError"),
    *("ValueError", "TypeError", "NotImplementedError", "RuntimeError"),
)
_HOLE = "\0"  # for a value in an f-string


def _texts(tree: ast.AST) -> Iterator[str]:
    """All strings in a piece of code, as they are put together."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else _HOLE for p in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _sources() -> Iterator[Path]:
    for package in ("adaskip_fx", "passes/adaskip_passes"):
        yield from sorted((_ROOT / package).rglob("*.py"))


def test_every_listed_text_is_in_a_message_of_the_code() -> None:
    known = [text for path in _sources() for text in _texts(ast.parse(path.read_text("utf-8")))]
    texts = {text for table in listed().values() for text in table}
    assert len(texts) > 20
    assert not [text for text in sorted(texts) if not any(text in one for one in known)]


@pytest.mark.parametrize("module", _CALLED)
def test_every_refusal_of_a_call_is_listed(module: str) -> None:
    tree = ast.parse((_ROOT / "adaskip_fx" / f"{module}.py").read_text("utf-8"))
    texts = [text for table in listed().values() for text in table]
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = node.exc.func
            if isinstance(name, ast.Name) and name.id in _REFUSALS:
                said = list(_texts(node.exc))
                if not any(len(text.replace(_HOLE, "")) > 25 for text in said):
                    continue  # put together elsewhere
                where = f"{module}.py:{node.lineno}: {said}"
                assert any(text in one for text in texts for one in said), where


@pytest.mark.parametrize("name", REFUSED)
def test_every_refused_method_of_a_cache_is_listed(name: str) -> None:
    assert is_listed(NotImplementedError(REFUSED[name]), ("Caches",))


def test_what_is_listed_under_another_heading_does_not_count() -> None:
    error = RuntimeError("ours: this cache cannot be pickled, no")
    assert is_listed(error)
    assert is_listed(error, ("Caches",))
    assert not is_listed(error, ("Calls",))
    assert not is_listed(KeyError("this cache cannot be pickled"))
    assert not is_listed(RuntimeError("something else"))
    with pytest.raises(ValueError, match="has no heading Nothing"):
        is_listed(error, ("Nothing",))
