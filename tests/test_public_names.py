"""`docs/reference/public.md` lists what is public; this compares it with the code."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import typer.main

from adaskip_fx.backend import adaskip
from adaskip_fx.cli.app import app
from adaskip_passes.errors import AdaskipError

PAGE = (Path(__file__).parents[1] / "docs/reference/public.md").read_text("utf-8")


def section(title: str) -> str:
    """The text under a heading of the page; the one without a heading is called ``""``."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))[title]


def rows(title: str) -> list[list[str]]:
    """The rows of a section's table, as cells."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


MODULES = {quoted(module)[0]: quoted(names) for module, names in rows("")}


@pytest.mark.parametrize("module", [m for m, names in MODULES.items() if names])
def test_a_module_has_the_names_that_the_page_lists(module: str) -> None:
    loaded, listed = importlib.import_module(module), MODULES[module]
    missing = [name for name in listed if not hasattr(loaded, name)]
    assert not missing, f"{module} has no {', '.join(missing)}, which the page lists"
    if hasattr(loaded, "__all__"):
        assert sorted(listed) == sorted(loaded.__all__)


def test_the_packages_are_listed() -> None:
    assert {"adaskip_fx", "adaskip_fx.policies", "adaskip_fx.testing", "adaskip_passes"} <= {
        *MODULES
    }


def test_public_things_say_what_they_are() -> None:
    for module, names in MODULES.items():
        for name in names:
            value = getattr(importlib.import_module(module), name)
            described = isinstance(value, type) or inspect.isroutine(value)
            assert not described or value.__doc__, f"{module}.{name} has no docstring"


def test_errors() -> None:
    listed = rows("Errors")
    assert len(listed) >= 9
    for name, module, builtin, _ in listed:
        error = getattr(importlib.import_module(quoted(module)[0]), quoted(name)[0])
        base = getattr(importlib.import_module("builtins"), quoted(builtin)[0])
        assert issubclass(error, AdaskipError)
        assert issubclass(error, base)


def test_every_public_error_is_listed() -> None:
    """Subclasses of `UnsupportedError` need not be: it is what they are caught as."""
    for name in MODULES:
        importlib.import_module(name)
    listed = {quoted(name)[0] for name, *_ in rows("Errors")}
    assert {error.__name__ for error in AdaskipError.__subclasses__()} <= listed


def test_commands() -> None:
    sentence = re.search(r"has the commands (.*?);", section("Command line"), re.DOTALL)
    assert sentence is not None
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert quoted(sentence[1]) == sorted(commands)


def test_options_of_the_backend() -> None:
    listed = [n for n in quoted(section("Options of the backend")) if "(" not in n]
    with torch.no_grad(), pytest.raises(ValueError, match="has no option wrong") as caught:
        adaskip(torch.fx.GraphModule({}, torch.fx.Graph()), [], options={"wrong": 1})
    known = str(caught.value).partition("it has ")[2].split(", ")
    assert sorted(listed) == sorted(known)


def test_aliases() -> None:
    for alias, name in re.findall(r"`([\w.]+)`, which is `(\w+)`", section("Changes")):
        module, _, old = alias.rpartition(".")
        loaded = importlib.import_module(module)
        errors = importlib.import_module("adaskip_passes.errors")
        assert getattr(loaded, old, getattr(errors, old, None)) is getattr(loaded, name)
