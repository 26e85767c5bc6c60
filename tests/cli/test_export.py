"""`adaskip-fx export --checkpoint`: the folder that it writes, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.surrogates import Surrogates
from tests.support.command_line import SUBLAYERS, misused, refused, run, save
from tests.support.eager_reference import Oracle, relative_error


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("export") / "model", template="{{ 1 }}")


def saved(folder: Path, plan: SkipPlan) -> Path:
    plan.save(folder / "plan.json")
    return folder / "plan.json"


def test_a_checkpoint(model: Path, tmp_path: Path) -> None:
    """Compiled anew, as a user does it; transformers alone gives what the hooked model does."""
    skipped = ("0.ffn", "1.attention")
    plan = saved(tmp_path, SkipPlan.of(SUBLAYERS, skipped))
    result = run("export", plan, "--checkpoint", tmp_path / "new", "--model", model, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["layers"] == 1
    assert (said["layers_before"], said["zeros"], said["scales"]) == (2, [], {})
    assert said["plan"] == SkipPlan.load(plan).digest
    assert said["error"] < 1e-6
    assert AutoTokenizer.from_pretrained(tmp_path / "new").chat_template == "{{ 1 }}"
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    ids = torch.arange(3, 20).unsqueeze(0)
    oracle = Oracle(AutoModelForCausalLM.from_pretrained(model))
    oracle.behave(dict.fromkeys(skipped, "skip"))
    with torch.no_grad():
        want = oracle.model(input_ids=ids, use_cache=False).logits
        assert relative_error(small(input_ids=ids).logits, want) < 1e-6
        assert small.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_what_is_refused(model: Path, tmp_path: Path) -> None:
    plan = saved(tmp_path, SkipPlan.of(SUBLAYERS, ["0.ffn"]))
    assert "say what is wanted: --vllm, or --checkpoint FOLDER" in misused(run("export", plan))
    asked = ("export", plan, "--checkpoint", tmp_path / "new")
    assert "--checkpoint needs the model: --model MODEL" in misused(run(*asked))
    line = refused(run("export", tmp_path, *asked[2:], "--model", model))
    assert "a folder, and a checkpoint is of one plan; name one of the plan files in it" in line
    factors = Surrogates.scale({SUBLAYERS[1]: 1.5})
    saved(tmp_path, SkipPlan.of(SUBLAYERS, ["0.ffn"], surrogates=factors))
    assert "0.ffn: its scale 1.5 can be folded" in refused(run(*asked, "--model", model))
    assert not (tmp_path / "new").exists()
