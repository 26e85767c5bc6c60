"""Quality against measured speed, joined from results that are written out here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.report import ReportError
from benchmarks.tradeoff import NEEDED, summary, tradeoff

WHERE = {"conditions": {"device": "a card"}}


def timed(context: int, prefill: float, decode: float, **more: Any) -> dict[str, Any]:
    return {"context": context, "prefill_speedup": prefill, "decode_speedup": decode, **more}


def skipped(count: int, ratio: float, **more: Any) -> dict[str, Any]:
    quality = {"prefill": ratio, "decode": ratio + 0.5}
    return {"policy": "AdaSkip", "published": True, "skipped": count, "quality": quality, **more}


def windowed(way: str, share: float, ratio: float, keys: float) -> dict[str, Any]:
    cost, score = {"perplexity_ratio": ratio, "kl": ratio - 1}, {"mean": keys}
    return {"way": way, "share": share, "texts": {"novel": cost}, "tasks": {"passkey": score}}


@pytest.fixture
def documents() -> dict[str, Any]:
    model = {"model": {"name": "small", "sublayers": 60}}
    speeds = [{"context": 32640, "skipped": 0}, timed(8192, 9.0, 9.0, skipped=8)]
    speeds += [timed(32640, 1.1, 1.2, skipped=8), timed(32640, 1.3, 1.4, skipped=16)]
    windows = [timed(32768, 1.19, 1.1, plan="half of the layers")]
    windows += [timed(32768, 1.2, 1.05, plan="half of the heads")]
    windows += [timed(32768, 1.5, 1.5, plan="half of the layers, 4 FFNs skipped")]
    points = [skipped(6, 1.4), skipped(8, 2.0), skipped(15, 5.0), skipped(20, 9.0)]
    points += [skipped(15, 0.1, published=False), {**skipped(15, 0.1), "policy": "Other"}]
    rows = [windowed("heads, forward", s, 1 + s / 10, 1 - s) for s in (0.4, 0.55, 0.7)]
    rows += [windowed("layers", 0.7, 1.3, 0.2), windowed("attention skipped", 0.5, 0.1, 0.0)]
    return {
        "speed": {"model": {"layers": 32}, "rows": speeds, **WHERE},
        "windows": {"window": 2048, "rows": windows, **WHERE},
        "study_pareto": {**model, "evaluated_on": "novel", "points": points},
        "study_windows": {**model, "rows": rows, "full": {"tasks": {"passkey": {"mean": 0.5}}}},
    }


def test_a_speed_goes_with_the_plan_that_leaves_out_at_least_as_much(
    documents: dict[str, Any],
) -> None:
    """8 of 64 sublayers are fewer than 8 of 60; half of all heads are 47% of what is read."""
    points = tradeoff(documents, 32768, "novel")["points"]
    found = [(p["policy"], p["left_out"], p["quality"]["prefill"], p["judged"]) for p in points]
    assert found == [
        ("AdaSkip", "8 of 64 sublayers", 2.0, "8 of 60"),
        ("AdaSkip", "16 of 64 sublayers", 5.0, "15 of 60"),
        ("windows, whole layers", "47% of K/V reads", 1.3, "70%, layers"),
        ("windows, K/V heads", "47% of K/V reads", 1.055, "55%, heads, forward"),
    ]
    assert [p["quality"]["decode"] for p in points] == [2.5, 5.5, 1.3, 1.055]
    assert [p["front"]["prefill"] for p in points] == [False, True, False, True]
    assert [p["front"]["decode"] for p in points] == [True, True, True, True]
    assert points[3]["passkeys"] == pytest.approx(0.9)
    lines = summary(tradeoff(documents, 32768, "novel")).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[3:6]] == [
        *("1.10x", "1.20x*", "2.000x, 2.500x (8 of 60)"),
    ]
    documents["study_windows"]["rows"][1]["share"] = 0.46  # companion
    points = tradeoff(documents, 32768, "novel")["points"]
    assert points[3]["judged"] == "70%, heads, forward"


def test_what_does_not_go_together_is_refused(documents: dict[str, Any]) -> None:
    def refused(message: str, context: int = 32768, text: str = "novel", **changed: Any) -> None:
        wrong = copy.deepcopy(documents)
        for name, change in changed.items():
            wrong[name] |= change
        with pytest.raises(ReportError, match=message):
            tradeoff(wrong, context, text)

    refused(r"speed\.json has no row at 4096 tokens: give --context, of 32640, 8192", 4096)
    refused("read on 'novel', not 'other': give --text, or run study_pareto", text="other")
    refused("has no text 'other': run it with --text other=FILE", text="other",
            study_pareto={"evaluated_on": "other"})  # fmt: skip
    refused(r"device \(speed: a card, windows: another\); measure them alike",
            windows={"conditions": {"device": "another"}})  # fmt: skip
    refused(r"name \(study_pareto: small, study_windows: large\); measure them alike",
            study_windows={"model": {"name": "large"}})  # fmt: skip
    refused("a result is not complete: KeyError", study_pareto={"points": [{}]})
    refused("no plan whose quality is known leaves out as much", speed={"rows": [
        {"context": 32640, "skipped": 0}]}, study_windows={"rows": []})  # fmt: skip


def test_the_command(documents: dict[str, Any], tmp_path: Path) -> None:
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    arguments = ["tradeoff", "--results", str(tmp_path), "--text", "novel"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["tradeoff.json", "tradeoff.png", "tradeoff.svg"]
    for name in NEEDED:
        (tmp_path / f"{name}.json").rename(tmp_path / "away")
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1
        assert f"{name}.json is missing: `python -m benchmarks run {name}` writes" in done.output
        (tmp_path / "away").rename(tmp_path / f"{name}.json")
