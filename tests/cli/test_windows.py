"""``adaskip-fx windows``: a plan from texts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaskip_fx import SkipPlan
from tests.support.command_line import refused, run, save

QUICK = ("--max-length", 160, "--samples", 2, "--window", 20, "--questions", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def book(folder: Path) -> Path:
    file = folder.parent / "book.txt"
    file.write_text("It was the best of tests, it was the worst of tests.\n" * 120)
    return file


def test_a_plan_is_saved(folder: Path, book: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = run("windows", folder, out, *QUICK, "--text", f"prose={book}", "--alpha", 1.4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("SkipPlan ")
    for said in ("questions", "search", "plans judged", f"saved to {out}"):
        assert said in result.stderr
    plan = SkipPlan.load(out)
    assert len(plan.windows.decode) == 1
    assert {w.tokens for w in plan.windows.decode.values()} == {20}
    said = run("windows", folder, out, *QUICK, "--layers", "--alpha", 4, "--json")
    assert json.loads(said.stdout)["saved_to"] == str(out)
    assert len(SkipPlan.load(out).windows.decode) == 2


@pytest.mark.slow
def test_with_measured_windows(folder: Path, book: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "table.json", tmp_path / "plan.json"
    backend = ("--backend", "eager", "--rounds", 1)
    measured = run("measure", folder, table, "--context", 160, "--window", 20, *backend)
    assert measured.exit_code == 0, measured.stderr
    assert "window 4+20" in measured.stdout
    arguments = (*QUICK, "--text", f"prose={book}", "--table", table, "--alpha", 1.0)
    result = run("windows", folder, out, *arguments)
    assert result.exit_code == 0, result.stderr
    assert not SkipPlan.load(out).windows.decode
    line = refused(run("windows", folder, out, *arguments[:-1], 50))
    assert "alpha must be from 1 to" in line


def test_what_it_refuses(folder: Path, book: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "plan.json", ("--text", f"prose={book}")
    line = refused(run("windows", folder, out, *QUICK, *text, "--window", 500))
    assert "sees all of the longest text" in line
    line = refused(run("windows", folder, tmp_path / "no" / "plan.json", *QUICK, *text))
    assert "no" in line
