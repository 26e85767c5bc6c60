"""``adaskip-fx eval`` on a tiny model: the table, the file, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaskip_fx.calibration.calibrate import calibrate
from adaskip_fx.evaluation.task_options import tasks_of
from adaskip_fx.evaluation.tasks import Passkey, Perplexity, Trec
from adaskip_fx.plans.decision_files import save_decision
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip
from tests.support.command_line import misused, refused, run
from tests.support.toy_models import SUBLAYERS, tiny_llama, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


def test_eval_prints_a_table_and_writes_a_file(folder: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out.json"
    SkipPlan.of(SUBLAYERS, ["0.attention"]).save(plan)
    result = run(
        *("eval", folder, "--plan", plan, "--backend", "eager", "--out", out),
        *("--samples", 2, "--max-length", 400, "--seed", 3),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    predicted, asked = report["results"]
    assert (predicted["task"], asked["task"]) == ("perplexity", "passkey")
    assert predicted["ran"]["prefill"]["skipped_fraction"] == 0.25
    assert predicted["kl"] > 0
    assert asked["options"]["seed"] == 3
    assert report["conditions"]["alpha"] is None  # an explicit plan has none
    assert report["conditions"]["name"] == folder.name
    lines = result.stdout.splitlines()
    titles = " ".join(lines[0].split())
    assert titles == "task n score model as is KL skipped: prefill decode"
    row = lines[1].split()
    assert row[:3] == ["perplexity", "2", f"{predicted['mean']:.2f}"]
    assert row[-2:] == [f"{predicted['kl']:.3f}", "0.250"]
    assert f"{predicted['reference']['mean']:.2f}" in row
    assert "perplexity, by position" in result.stdout
    assert "0-255" in result.stdout
    assert max(map(len, lines)) <= 100
    assert "evaluate ...\n" in result.stderr
    assert result.stderr.endswith(f"saved to {out}\n")


@pytest.mark.slow
def test_eval_of_a_schedule(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    plans = (SkipPlan.empty(SUBLAYERS), SkipPlan.of(SUBLAYERS, [], decode_extra=["0.ffn"]))
    save_decision(Schedule(((0, plans[0]), (3, plans[1]))), tmp_path / "schedule")
    result = run(
        *("eval", folder, "--plan", tmp_path / "schedule", "--backend", "eager", "--out", out),
        *("--task", "decode_perplexity", "--set", "decode_perplexity.steps=6"),
        *("--samples", 1, "--max-length", 40),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    plan = report["conditions"]["plan"]
    assert plan["kind"] == "schedule"
    assert [p["digest"] for p in plan["plans"]] == [p.digest for p in plans]
    (found,) = report["results"]
    assert found["ran"]["decode"]["tokens_skipped"] == {"0.ffn": 3}
    assert found["ran"]["plans"] == [p.digest for p in plans]
    # as many steps as it takes the schedule to leave something out, less one
    out.unlink()
    result = run(
        *("eval", folder, "--plan", tmp_path / "schedule", "--backend", "eager", "--out", out),
        *("--task", "decode_perplexity", "--set", "decode_perplexity.steps=3"),
        *("--samples", 1, "--max-length", 40),
    )
    text = refused(result)
    assert "the task decode_perplexity ran 1 prompts and 3 decode steps, and nothing was" in text
    assert "the plan leaves out 0.ffn in decode. What was measured is the full model." in text
    assert not out.exists()


def test_eval_as_json(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ("--task", "passkey", "--samples", 1, "--max-length", 300, "--out", out, "--json")
    result = run("eval", folder, *options)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said == json.loads(out.read_text())
    assert [r["task"] for r in said["results"]] == ["passkey"]
    assert {"device", "processor", "threads", "cores", "python", "torch"} <= set(said["conditions"])


@pytest.mark.slow
def test_eval_with_a_profile(folder: Path, tmp_path: Path) -> None:
    learned, out = tmp_path / "learned", tmp_path / "out.json"
    profile = calibrate(tiny_llama(), tokenizer(), ["a text to learn from, and more of it"])
    profile.save(learned)
    result = run(
        *("eval", folder, learned, "--alpha", 1.5, "--backend", "eager", "--out", out),
        *("--task", "passkey", "--samples", 1, "--max-length", 300, "--no-compare"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["conditions"]["alpha"] == 1.5
    assert report["conditions"]["policy"] == repr(AdaSkip())
    assert report["conditions"]["plan"] == AdaSkip().plan(profile, 1.5).to_json()
    (asked,) = report["results"]
    assert asked["ran"]["prefill"]["skipped_fraction"] == 0.25
    assert asked["reference"] is None
    result = run(
        *("eval", folder, learned, "--alpha", 1.1, "--backend", "eager", "--out", out),
        *("--task", "passkey", "--samples", 1, "--max-length", 300, "--no-compare"),
        *("--context", 250),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert (report["conditions"]["alpha"], report["conditions"]["context"]) == (1.1, 250)


def test_eval_of_the_model_as_it_is(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("some words " * 200)
    result = run(
        *("eval", folder, "--task", "perplexity", "--data", f"perplexity={file}"),
        *("--samples", 1, "--max-length", 100),
    )
    assert result.exit_code == 0, result.output
    assert "perplexity (own.txt)" in result.stdout
    assert "compile" not in result.stderr


def test_tasks_by_name_and_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for file in (one, two):
        file.write_text("x")
    options = {"length": 99, "seed": 1}
    names = ["perplexity", "trec", "passkey"]
    data = [f"perplexity={one}", f"perplexity={two}", f"trec={one}", f"trec.train={two}"]
    changes = ["passkey.forced=false", "passkey.seed=7", "perplexity.edges=[3, 5]"]
    assert tasks_of(names, data, changes, options) == [
        Perplexity(length=99, seed=1, path=one, edges=(3, 5)),
        Perplexity(length=99, seed=1, path=two, edges=(3, 5)),
        Trec(length=99, seed=1, path=one, train=two),
        Passkey(length=99, seed=7, forced=False),
    ]


def test_eval_refuses(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    base = ("eval", folder)
    assert "unknown task 'x'; there are perplexity, " in misused(run(*base, "--task", "x"))
    missing = refused(run(*base, "--data", f"passkey={tmp_path / 'absent'}"))
    assert missing.endswith("absent: no such file")
    unasked = misused(run(*base, "--data", f"trec={file}"))
    assert f"--data trec={file}: the task trec is not asked for; add --task trec" in unasked
    for wrong in ("passkey", "passkey=", f"x={file}"):
        assert f"--data {wrong}: not TASK=PATH" in misused(run(*base, "--data", wrong))
    other = misused(run(*base, "--data", f"passkey.train={file}"))
    assert "passkey has no file 'train'; it has path" in other
    assert "frequent_words has no file 'path'; it has none" in misused(
        run(*base, "--task", "frequent_words", "--data", f"frequent_words={file}")
    )
    assert "--set passkey.x=1: passkey has no option 'x'; it has samples, " in misused(
        run(*base, "--set", "passkey.x=1")
    )
    assert "--set passkey.path=1: passkey has no option 'path'" in misused(
        run(*base, "--set", "passkey.path=1")
    )
    assert "--set passkey.seed=a: not JSON; write a text in double quotes" in misused(
        run(*base, "--set", "passkey.seed=a")
    )
    assert "--set passkey=1: not TASK.OPTION=VALUE" in misused(run(*base, "--set", "passkey=1"))
    assert "summary reads a file" in refused(run(*base, "--task", "summary"))
    assert "raise length (--max-length)" in refused(run(*base, "--max-length", 20))
    assert "no such file" in refused(run(*base, "--plan", tmp_path / "absent"))
