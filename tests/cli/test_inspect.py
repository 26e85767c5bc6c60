"""``adaskip-fx inspect``: profiles, decisions and graphs, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

import adaskip_fx
from adaskip_fx.cli.graph_text import excerpt
from adaskip_fx.latency.table import LatencyTable
from adaskip_fx.latency.terms import Costs
from adaskip_fx.plans.decision_files import save_decision
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.skip_plan import Phase
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.policies import AdaSkip, TimedBySimilarity
from tests.support.command_line import SUBLAYERS, misused, refused, run


def test_inspect_a_profile(profile: Path) -> None:
    saved = adaskip_fx.Profile.load(profile)
    result = run("inspect", profile)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{saved}\nmodel: {saved.fingerprint}\n")
    assert "samples 3, max_length 64" in result.stdout
    assert "SkipPlan" not in result.stdout
    preview = run("inspect", profile, "--alpha", 2)
    assert preview.stdout.endswith(f"alpha 2: {AdaSkip().plan(saved, 2)}\n")
    assert "Invalid value for '--alpha'" in misused(run("inspect", profile, "--alpha", 0.9))


def test_inspect_what_a_profile_would_skip_for_time(profile: Path, tmp_path: Path) -> None:
    saved = adaskip_fx.Profile.load(profile)
    seconds = {"rest": 1.0, "attention": 1.0, "ffn": 8.0, "scale": 0.0}
    costs = tuple(Costs(phase, 100, seconds) for phase in get_args(Phase))
    names = tuple(s.kind for s in SUBLAYERS)
    file = tmp_path / "table.json"
    table = LatencyTable(saved.fingerprint, {}, SUBLAYERS, names, costs)
    table.save(file)
    policy = TimedBySimilarity(table, 100)
    plan = policy.plan(saved, 1.5)
    assert [s.kind for s in plan.skipped("decode")] == ["ffn"]
    timed = ("inspect", profile, "--context", 100, "--table", file)
    result = run(*timed, "--alpha", 1.5)
    assert result.stdout.endswith(f"alpha 1.5: {plan}\n{policy.describe(plan, saved)}\n")
    assert json.loads(run(*timed, "--alpha", 1.5, "--json").stdout)["plan"]["digest"] == plan.digest
    assert f"alpha 1.2: {policy.plan(saved, 1.2)}" in run(*timed).stdout
    assert "alpha 30 cannot be met at 100 tokens" in refused(run(*timed, "--alpha", 30))
    for alone in (timed[:4], (*timed[:2], *timed[4:]), ("inspect", file, *timed[2:])):
        assert "--context and --table go together, with a profile" in misused(run(*alone))


def test_inspect_a_decision(plan: Path, tmp_path: Path) -> None:
    loaded = adaskip_fx.SkipPlan.load(plan)
    decision = Schedule(((0, loaded),))
    save_decision(decision, tmp_path / "schedule")
    result = run("inspect", tmp_path / "schedule")
    assert result.exit_code == 0
    assert str(decision) in result.stdout
    for more in (["--alpha", 2], ["--graph"]):
        assert "holds several plans" in refused(run("inspect", tmp_path / "schedule", *more))


def test_inspect_a_plan(plan: Path, tmp_path: Path) -> None:
    result = run("inspect", plan)
    assert result.exit_code == 0
    assert result.stdout == f"{adaskip_fx.SkipPlan.load(plan)}\n"
    assert "--alpha is for profiles" in misused(run("inspect", plan, "--alpha", 2))
    assert "no such file or folder" in refused(run("inspect", tmp_path / "absent"))
    broken = tmp_path / "broken.json"
    broken.write_text(plan.read_text()[:-20])
    assert "truncated or not JSON" in refused(run("inspect", broken))


GRAPH = """
prefill, before:

inputs_embeds, cos_2, sin_2 = prologue(+5 inputs)
x_1 = layers_0_attention(inputs_embeds, cos_2, sin_2, +8 inputs)
x_2 = layers_0_ffn(x_1, +5 inputs)
x_3 = layers_1_attention(x_2, cos_2, sin_2, +8 inputs)
x_4 = layers_1_ffn(x_3, +5 inputs)
epilogue = epilogue(x_4, +3 inputs)
return (epilogue,)

prefill, after:

inputs_embeds, cos_2, sin_2 = prologue(+5 inputs)
scale_0 = scale(inputs_embeds, factor_0, +1 inputs)
x_2 = layers_0_ffn(scale_0, +5 inputs)
x_3 = layers_1_attention(x_2, cos_2, sin_2, +8 inputs)
x_4 = layers_1_ffn(x_3, +5 inputs)
epilogue = epilogue(x_4, +3 inputs)
return (epilogue,)

decode, before:

inputs_embeds, sub, cos_2, sin_2 = prologue(+5 inputs)
x_1 = layers_0_attention(inputs_embeds, cos_2, sin_2, sub, +8 inputs)
x_2 = layers_0_ffn(x_1, +4 inputs)
x_3 = layers_1_attention(x_2, cos_2, sin_2, sub, +8 inputs)
x_4 = layers_1_ffn(x_3, +4 inputs)
epilogue = epilogue(x_4, +2 inputs)
return (epilogue,)

decode, after:

inputs_embeds, sub, cos_2, sin_2 = prologue(+5 inputs)
scale_0 = scale(inputs_embeds, factor_0)
x_2 = layers_0_ffn(scale_0, +4 inputs)
x_3 = layers_1_attention(x_2, cos_2, sin_2, sub, +8 inputs)
epilogue = epilogue(x_3, +2 inputs)
return (epilogue,)
"""


def test_the_outer_graph_before_and_after(plan: Path) -> None:
    result = run("inspect", plan, "--graph")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{adaskip_fx.SkipPlan.load(plan)}\n{GRAPH}"


@pytest.mark.slow
def test_the_graph_of_a_model_and_of_the_wrong_model(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    adaskip_fx.SkipPlan.of(SUBLAYERS, ["1.ffn"]).save(file)
    result = run("inspect", file, "--graph", "--model", folder)
    before, after = result.stdout.split("prefill, after:")
    assert "layers_1_ffn(" in before
    assert "layers_1_ffn(" not in after
    assert "decode" not in result.stdout.split("prefill, before:")[1]  # it is no different
    longer = adaskip_fx.SkipPlan.empty([*SUBLAYERS, adaskip_fx.Sublayer(2, "ffn")])
    longer.save(file)
    assert "--model" in refused(run("inspect", file, "--graph", "--model", folder))
    assert "not of a plain transformer" in refused(run("inspect", file, "--graph"))


def test_an_excerpt_is_where_a_plan_skips_the_most() -> None:
    sublayers = [adaskip_fx.Sublayer(i, kind) for i in range(5) for kind in ("attention", "ffn")]
    factors = Surrogates.scale({sublayers[6]: 1.5, sublayers[0]: 2.0})
    whole = adaskip_fx.SkipPlan.of(
        sublayers, ["0.attention", "3.attention"], decode_extra=["4.ffn"], surrogates=factors
    )
    short, first = excerpt(whole)
    assert first == 3
    assert short == adaskip_fx.SkipPlan.of(
        SUBLAYERS,
        ["0.attention"],
        decode_extra=["1.ffn"],
        surrogates=Surrogates.scale({SUBLAYERS[0]: 1.5}),
    )
    assert excerpt(short) == (short, 0)


def test_inspect_as_json(plan: Path, profile: Path, tmp_path: Path) -> None:
    loaded = adaskip_fx.SkipPlan.load(plan)
    assert json.loads(run("inspect", plan, "--json").stdout) == {
        "kind": "plan",
        **loaded.to_json(),
    }
    schedule = Schedule(((0, loaded),))
    save_decision(schedule, tmp_path / "schedule")
    said = json.loads(run("inspect", tmp_path / "schedule", "--json").stdout)
    assert (said["kind"], said["digest"]) == (schedule.kind, schedule.digest)
    assert [p["digest"] for p in said["plans"]] == [p.digest for p in schedule.plans]
    said = json.loads(run("inspect", profile, "--alpha", 2, "--json").stdout)
    wanted = AdaSkip().plan(adaskip_fx.Profile.load(profile), 2)
    assert said["plan"] == {"kind": "plan", **wanted.to_json()}


def test_graphs_as_json(plan: Path) -> None:
    result = run("inspect", plan, "--graph", "--json")
    assert result.exit_code == 0, result.stderr
    graphs = json.loads(result.stdout)["graphs"]
    shown = [f"{g['phase']}, {w}:\n\n{g[w]}" for g in graphs for w in ("before", "after")]
    assert "\n" + "\n\n".join(shown) + "\n" == GRAPH
