"""``adaskip-fx measure``: the table, as text and as JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command_line import misused, refused, run


def test_measure_writes_a_table_that_inspect_shows(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    options = ("--context", 64, "--context", 32, "--rounds", 1, "--backend", "eager")
    result = run("measure", folder, out, *options)
    assert result.exit_code == 0, result.output
    assert "measure: " in result.stderr
    assert f"saved to {out}" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("LatencyTable ")
    assert "backend eager" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["32", "64", "32", "64"]
    assert "low_rank" not in lines[1]
    assert run("inspect", out).stdout == result.stdout
    said = json.loads(run("inspect", out, "--json").stdout)
    assert said == {"kind": "latency table", **json.loads(out.read_text())}
    assert "a latency table has no graph" in refused(run("inspect", out, "--graph"))
    out.write_text(out.read_text().replace("eager", "lazy"))
    assert "edited after it was saved" in refused(run("inspect", out))


@pytest.mark.slow
def test_measure_times_ranks_if_asked(folder: Path, tmp_path: Path) -> None:
    options = ("--context", 32, "--rounds", 1, "--backend", "eager", "--ranks")
    result = run("measure", folder, tmp_path / "table.json", *options)
    assert result.exit_code == 0, result.output
    columns = [name.strip() for name in result.stdout.splitlines()[1].split("|")]
    assert columns[2:-1] == [
        *("rest", "attention (2)", "ffn (2)", "scale"),
        *("low_rank 1", "low_rank 2", "low_rank 4", "linear"),
    ]


def test_measure_refuses_before_it_works(folder: Path, tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "absent" / "table.json"):
        message = refused(run("measure", tmp_path / "no-model", out, "--context", 32))
        assert message.endswith("a table is a file in a folder that exists; choose another path")
    file = tmp_path / "table.json"
    short = refused(run("measure", folder, file, "--context", 8, "--backend", "eager"))
    assert "contexts must be lengths of at least 16 tokens" in short
    assert "Missing option '--context'" in misused(run("measure", folder, file))
    assert not file.exists()


@pytest.mark.slow
def test_measure_as_json(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    options = ("--context", 32, "--rounds", 1, "--backend", "eager", "--json")
    result = run("measure", folder, out, *options)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said.pop("saved_to") == str(out)
    assert said.pop("kind") == "latency table"
    assert said == json.loads(out.read_text())
    assert [c["context"] for c in said["costs"]] == [32, 32]
