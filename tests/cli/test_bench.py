"""``adaskip-fx bench``: the table, the JSON object, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import adaskip_fx
from adaskip_fx.plans.decision_files import save_decision
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.policies import AdaSkip
from tests.support.command_line import SUBLAYERS, refused, run

QUICK = ("--context", 32, "--rounds", 2, "--backend", "eager")


def test_the_table(folder: Path, plan: Path) -> None:
    result = run("bench", folder, "--plan", plan, *QUICK, "--context", 20, "--eager")
    assert result.exit_code == 0, result.stderr
    about, *lines = result.stdout.splitlines()
    assert f"name {folder.name}, model LlamaForCausalLM, parameters " in about
    assert "dtype float32, backend eager, batch 1, rounds 2, device CPU" in about
    assert f"torch {torch.__version__}" in about
    assert lines[0] == str(adaskip_fx.SkipPlan.load(plan)).splitlines()[0]
    titles, *rows = lines[-5:]
    assert titles.split() == ["tokens", "eager", "nothing", "skipped", "plan"]
    assert [row.split("  ")[0] for row in rows] == ["prompt"] * 2 + ["decode step"] * 2
    assert [int(re.findall(r" (\d+)  ", row)[0]) for row in rows] == [20, 32, 20, 32]
    for row in rows:  # the other two are compared with the full model
        assert len(re.findall(r"\d m?s \(\d+\.\d\dx\)", row)) == 2


@pytest.mark.slow
def test_as_json(folder: Path, profile: Path) -> None:
    result = run("bench", folder, profile, "--alpha", 1.5, *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["plan"] == AdaSkip().plan(adaskip_fx.Profile.load(profile), 1.5).to_json()
    assert said["conditions"]["batch"] == 1
    assert [(t["phase"], t["contender"], t["context"]) for t in said["times"]] == [
        (phase, name, 32) for phase in ("prefill", "decode") for name in ("nothing skipped", "plan")
    ]
    for time in said["times"]:
        assert len(time["seconds"]) == 2
        assert time["min"] <= time["median"] <= time["max"]


@pytest.mark.slow
def test_without_a_plan_the_full_model_is_timed(folder: Path) -> None:
    result = run("bench", folder, *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["plan"] is None
    assert {t["contender"] for t in said["times"]} == {"nothing skipped"}


@pytest.mark.slow
def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    full = adaskip_fx.SkipPlan.empty(SUBLAYERS)
    schedule = Schedule(
        ((0, full), (4, adaskip_fx.SkipPlan.of(SUBLAYERS, [], decode_extra=["0.ffn"])))
    )
    save_decision(schedule, tmp_path / "schedule")
    several = refused(run("bench", folder, "--plan", tmp_path / "schedule"))
    assert "holds several plans; name one of its plan files instead" in several
    short = refused(run("bench", folder, "--context", 8, "--backend", "eager"))
    assert "contexts must be lengths of at least 16 tokens" in short
    other = tmp_path / "other.json"
    adaskip_fx.SkipPlan.empty([*SUBLAYERS, adaskip_fx.Sublayer(2, "ffn")]).save(other)
    assert "the plan" in refused(run("bench", folder, "--plan", other, *QUICK))


@pytest.mark.parametrize("option", ["--rounds", "--batch"])
def test_none_of_something_is_a_usage_error(folder: Path, option: str) -> None:
    assert run("bench", folder, option, 0).exit_code == 2
