"""Runs of made-up situations: rows that fail, what stays, and what a stopped run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import situations, speed
from benchmarks.__main__ import app
from benchmarks.situations.bench import Bench
from benchmarks.situations.rows import Row, over


def _fine(one: Bench) -> Iterator[Row]:
    yield over("fine", 0.002, 0.001, 3)


def _failing(one: Bench) -> Iterator[Row]:
    yield over("before", 0.002, 0.001, 1)
    raise RuntimeError("out of\nmemory")


def test_a_situation_that_fails_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(situations, "SITUATIONS", {"failing": _failing, "fine": _fine})
    result = situations.measure()
    before, failed, fine = result["rows"]
    assert (before["situation"], before["what"], before["met"]) == ("failing", "before", False)
    assert failed == {"situation": "failing", "failed": "RuntimeError: out of\nmemory"}
    assert (fine["situation"], fine["what"], fine["met"]) == ("fine", "fine", True)
    shown = situations.summary(result).splitlines()
    assert shown[2] == "failing         failed: RuntimeError: out of"
    assert shown[-2] == "1 of 2 targets met, 1 situations failed"
    assert capsys.readouterr().err.splitlines() == shown[1:4]  # as they came


# The command line.


def test_run_measures_those_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Callable[[Bench], Iterator[Row]]] = {"failing": _failing, "fine": _fine}
    monkeypatch.setattr(situations, "SITUATIONS", names)
    arguments = ["run", "situations", "--only", "fine", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "situations.json").read_text())
    assert [row["what"] for row in document["rows"]] == ["fine"]
    assert document["conditions"]["torch"] == str(torch.__version__)
    assert result.stdout == f"situations:\n{situations.summary(document)}\n"
    report = CliRunner().invoke(app, ["report", "--results", str(tmp_path)])
    assert "| fine      | fine |    2.000 |     1.000 | ms   | 2.000 |" in report.stdout


def test_what_is_not_measured_again_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Callable[[Bench], Iterator[Row]]] = {"failing": _failing, "fine": _fine}
    monkeypatch.setattr(situations, "SITUATIONS", names)
    file = tmp_path / "situations.json"

    def run(*only: str) -> list[str]:
        options = [word for name in only for word in ("--only", name)]
        CliRunner().invoke(app, ["run", "situations", *options, "--out", str(tmp_path)])
        document = json.loads(file.read_text())
        assert list(document["runs"]) == list(
            dict.fromkeys(r["situation"] for r in document["rows"])
        )
        return [row["situation"] for row in document["rows"]]

    assert run("fine") == ["fine"]
    assert run("failing") == ["failing", "failing", "fine"]  # in their order, none twice
    assert run("failing") == ["failing", "failing", "fine"]
    document = json.loads(file.read_text())
    document["runs"]["fine"]["conditions"]["device"] = "another card"
    file.write_text(json.dumps(document))
    assert run("failing") == ["failing", "failing"]


def test_a_run_that_is_stopped_leaves_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(one: Bench) -> Iterator[Row]:
        yield over("lost", 0.002, 0.001, 3)
        raise KeyboardInterrupt

    names = {"fine": _fine, "stopped": stopped, "after": _fine}
    monkeypatch.setattr(situations, "SITUATIONS", names)
    CliRunner().invoke(app, ["run", "situations", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "situations.json").read_text())
    assert [row["what"] for row in document["rows"]] == ["fine"]
    assert document["conditions"]["torch"] == str(torch.__version__)


def test_unknown_situation_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "measure", lambda: pytest.fail("it ran"))
    arguments = ["run", "speed", "situations", "--only", "trun", "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "'trun' is none of" in result.output
    assert not (tmp_path / "new").exists()
