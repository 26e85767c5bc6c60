"""``adaskip-fx calibrate``: the profile, what is printed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import Result

import adaskip_fx
from adaskip_fx.plans.windows import Window
from tests.support.command_line import KV_HEADS, LAYERS, SUBLAYERS, misused, refused, run


def test_calibrate_saves_and_prints_the_profile(calibrated: tuple[Path, Result]) -> None:
    out, result = calibrated
    saved = adaskip_fx.Profile.load(out)
    assert result.exit_code == 0
    assert result.stdout == f"{saved}\n"
    assert saved.sublayers == SUBLAYERS
    assert saved.statistics.shape[0] == 3
    assert saved.tokens == 3 * 64
    assert "calibrate ...\n" in result.stderr
    assert "\x1b" not in result.stderr
    assert " of 3" not in result.stderr  # stderr is no terminal
    assert result.stderr.endswith(f"saved to {out}\n")


def test_calibrate_reads_files(folder: Path, tmp_path: Path) -> None:
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    short.write_text("a short text of one sample")
    out = tmp_path / "out"
    files = ("--text", long, "--text", short)
    assert run("calibrate", folder, out, *files, "--max-length", 64).exit_code == 0
    tokens = adaskip_fx.Profile.load(out).statistics[:, 0, -1]
    assert tokens.tolist() == [64, 64, len(short.read_text())]


def test_calibrate_refuses(folder: Path, tmp_path: Path) -> None:
    other, latin = tmp_path / "other", tmp_path / "latin.txt"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    latin.write_bytes("caf\xe9".encode("latin-1"))
    absent, out = tmp_path / "absent", tmp_path / "out"
    assert "holds other files" in refused(run("calibrate", folder, other))
    assert "no such folder" in refused(run("calibrate", absent, out))
    assert "No such file" in refused(run("calibrate", folder, out, "--text", absent))
    assert "not UTF-8" in refused(run("calibrate", folder, out, "--text", latin))
    assert "5000" in refused(run("calibrate", folder, out, "--max-length", 5000))
    assert "Invalid value for '--dtype'" in misused(
        run("calibrate", folder, out, "--dtype", "int8")
    )
    assert "unknown device" in refused(run("calibrate", folder, out, "--device", "abacus"))
    assert "Invalid value for '--samples'" in misused(run("calibrate", folder, out, "--samples", 0))
    assert not out.exists()
    assert (other / "notes.txt").read_text() == "mine"


def test_calibrate_measures_windows(folder: Path, tmp_path: Path) -> None:
    """In the same runs; without the option there are none."""
    out = tmp_path / "out"
    options = ("--max-length", 64, "--samples", 2, "--windows", "16, 32", "--sinks", 2, "--json")
    result = run("calibrate", folder, out, *options)
    assert result.exit_code == 0, result.stderr
    measured = adaskip_fx.Profile.load(out).windows
    assert measured is not None
    assert measured.windows == (Window(16, 2), Window(32, 2))
    said = json.loads(result.stdout)["windows"]
    assert [(w["tokens"], w["sinks"]) for w in said] == [(16, 2), (32, 2)]
    for window, shown in zip(measured.windows, said, strict=True):
        heads = {(h["sublayer"], h["head"]): h["dissimilarity"] for h in shown["kv_heads"]}
        known = measured.dissimilarity(window).items()
        assert heads == {(str(sublayer), head): change for (sublayer, head), change in known}
        assert len(heads) == LAYERS * KV_HEADS
    assert "measured through window 2+16, window 2+32\n" in run("inspect", out).stdout


def test_calibrate_refuses_windows(
    folder: Path, calibrated: tuple[Path, Result], tmp_path: Path
) -> None:
    for words in ("16,", "a", "0", "-3", "1.5"):
        said = misused(run("calibrate", folder, tmp_path / "out", "--windows", words))
        assert "Invalid value for --windows" in said
        assert "numbers of tokens, with commas between" in said
    wide = run("calibrate", folder, tmp_path / "out", "--max-length", 64, "--windows", 60)
    assert "a window 4+60 sees all of the longest text, which has 64 tokens" in refused(wide)
    assert not (tmp_path / "out").exists()
    assert adaskip_fx.Profile.load(calibrated[0]).windows is None


def test_calibrate_as_json(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--max-length", 64, "--samples", 2, "--json")
    result = run("calibrate", folder, out, *options)
    assert result.exit_code == 0, result.stderr
    said, saved = json.loads(result.stdout), adaskip_fx.Profile.load(out)
    assert said["kind"] == "profile"
    assert said["saved_to"] == str(out)
    assert (said["digest"], said["tokens"]) == (saved.digest, saved.tokens)
    assert [row["sublayer"] for row in said["sublayers"]] == list(map(str, SUBLAYERS))
    assert [row["scale"] for row in said["sublayers"]] == pytest.approx(saved.scale())
    assert said["calibration"]["samples"] == 2
    assert json.loads(run("inspect", out, "--json").stdout) == {
        key: value for key, value in said.items() if key != "saved_to"
    }
