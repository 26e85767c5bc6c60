"""Which plans an engine can run, and how it is given them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from adaskip_fx.plans.phase_split import decode_only, prefill_only
from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.serving.overrides import overrides, plan_of
from adaskip_fx.serving.static_plan import static_plan
from tests.support.command_line import misused, refused, run
from tests.support.surrogates import surrogate

SUBLAYERS = tuple(Sublayer(i, k) for i in range(3) for k in ("attention", "ffn"))
ATTENTION, FFN = Sublayer(1, "attention"), Sublayer(1, "ffn")
FACTORS = Surrogates.scale({ATTENTION: 0.75, FFN: 1.25})
PLAN = SkipPlan.of(SUBLAYERS, [ATTENTION, FFN], surrogates=FACTORS)
EXTRA = SkipPlan.of(SUBLAYERS, [ATTENTION], decode_extra=[FFN], surrogates=FACTORS)


def config(data: object) -> Any:
    """What vLLM makes of a model's configuration and overrides."""
    made = LlamaConfig()
    made.adaskip = json.loads(json.dumps(data))
    return made


# One plan for both phases -----------------------------------------------------------------------


def test_a_plan_that_is_one_for_both_phases_stays_as_it_is() -> None:
    assert static_plan(PLAN) == PLAN


def test_of_a_plan_whose_phases_differ_one_is_chosen() -> None:
    message = (
        r"^1\.ffn: run in prefill but skip in decode; an engine runs prompts and decode steps in "
        r"one batch, .*--phase prefill or --phase decode$"
    )
    with pytest.raises(PlanError, match=message):
        static_plan(EXTRA)
    assert static_plan(EXTRA, "decode") == PLAN
    kept = SkipPlan.of(SUBLAYERS, [ATTENTION], surrogates=Surrogates.scale({ATTENTION: 0.75}))
    assert static_plan(EXTRA, "prefill") == kept


def test_attention_that_writes_what_nobody_reads_is_skipped() -> None:
    written = {ATTENTION: Action.KV_ONLY}
    plan = SkipPlan(SUBLAYERS, written, written)
    assert static_plan(plan).skipped("decode") == (ATTENTION,)
    assert static_plan(decode_only(PLAN), "decode") == PLAN
    with pytest.raises(PlanError, match=r"1\.attention: kv_only in prefill but run in decode"):
        static_plan(prefill_only(PLAN))


def test_windows_that_differ_by_phase() -> None:
    plan = SkipPlan.empty(SUBLAYERS).with_windows(Windows(decode={ATTENTION: Window(8, 0)}))
    with pytest.raises(PlanError, match=r"attention: run in prefill but window 0\+8 in decode"):
        static_plan(plan)
    assert static_plan(plan, "decode").window("prefill", ATTENTION) == Window(8, 0)
    assert not static_plan(plan, "prefill").windows


# In a configuration -----------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    for plan in (PLAN, PLAN.with_windows(Windows.of([Sublayer(0, "attention")], Window(9, 0)))):
        assert plan_of(config(overrides(plan, tmp_path)["adaskip"])) == plan
    assert plan_of(LlamaConfig()) is None


def test_the_configuration_differs_where_the_plan_does(tmp_path: Path) -> None:
    """vLLM names compiled programs by its text."""
    other = PLAN.with_surrogates(Surrogates.scale({ATTENTION: 0.75, FFN: 1.25001}))
    texts = {config(overrides(p, tmp_path)["adaskip"]).to_json_string() for p in (PLAN, other)}
    assert len(texts) == 2
    assert all('"digest"' in text for text in texts)


def test_tensors_are_named_by_what_is_in_them(tmp_path: Path) -> None:
    plans = [
        PLAN.with_surrogates(Surrogates({FFN: surrogate("linear", seed)})) for seed in range(2)
    ]
    given = [overrides(plan, tmp_path)["adaskip"] for plan in plans]
    assert len({str(g) for g in given}) == 2  # the folder is the same, the names are not
    for data, plan in zip(given, plans, strict=True):
        assert plan_of(config(data)) == plan
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(PlanError, match="is missing: copy it along with the plan"):
        plan_of(config(given[0]))


def test_a_plan_that_was_edited_is_refused(tmp_path: Path) -> None:
    data: Any = overrides(PLAN, tmp_path)["adaskip"]
    edited = {**data, "prefill": {"0.ffn": "skip"}, "decode": {"0.ffn": "skip"}}
    with pytest.raises(PlanError, match=r"adaskip of the model's configuration: edited after"):
        plan_of(config(edited))
    with pytest.raises(PlanError, match="missing digest"):
        plan_of(config({k: v for k, v in data.items() if k != "digest"}))
    with pytest.raises(PlanError, match=r"not an object but 'plan\.json'; give what"):
        plan_of(config("plan.json"))
    with pytest.raises(PlanError, match="not a valid plan"):
        plan_of(config({**data, "windows": 3}))


# The command ------------------------------------------------------------------------------------


def test_export_prints_what_vllm_takes(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    printed = run("export", "--vllm", tmp_path / "plan.json").stdout
    assert printed.count("\n") == 1  # fits into a shell's quotes
    assert "'" not in printed
    assert plan_of(config(json.loads(printed)["adaskip"])) == PLAN
    told = json.loads(run("export", "--vllm", tmp_path / "plan.json", "--json").stdout)
    assert told["hf_overrides"] == json.loads(printed)
    assert told["digest"] == PLAN.digest
    assert told["skipped"] == ["1.attention", "1.ffn"]


def test_export_of_one_phase(tmp_path: Path) -> None:
    linear = Surrogates({FFN: surrogate("linear"), ATTENTION: surrogate("diagonal")})
    EXTRA.with_surrogates(linear).save(tmp_path / "plan.json")
    message = refused(run("export", "--vllm", tmp_path / "plan.json"))
    assert "1.ffn: run in prefill but skip in decode" in message
    printed = run("export", "--vllm", tmp_path / "plan.json", "--phase", "prefill").stdout
    served = plan_of(config(json.loads(printed)["adaskip"]))
    assert served is not None
    assert served.surrogates.by_sublayer.keys() == {ATTENTION}


def test_export_refuses(tmp_path: Path) -> None:
    told = misused(run("export", tmp_path / "plan.json"))
    assert "say what is wanted: --vllm, or --checkpoint FOLDER" in told
    assert "no such file" in refused(run("export", "--vllm", tmp_path / "plan.json"))
    assert "an engine runs one plan" in refused(run("export", "--vllm", tmp_path))
