"""`adaskip-fx doctor`: what it finds, and that it says what is in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adaskip_fx.cli import doctor
from tests.support.command_line import make_tokenizer, refused, run
from tests.support.families.all import tiny_config, tiny_model


@pytest.fixture(autouse=True)
def _some_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaskip_fx.utils.torch_internals.find_cpp_compiler", lambda: "g++")


def test_a_model_that_can_be_used(folder: Path) -> None:
    result = run("doctor", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = {line.split()[1]: line for line in result.stdout.splitlines()}
    assert rows["torch"].startswith("ok ")
    assert torch.__version__.partition("+")[0] in rows["torch"]
    assert "LlamaForCausalLM, 4 sublayers: attention 0-1, ffn 0-1" in rows[folder.name]


@pytest.mark.slow
def test_a_model_that_cannot(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("doge"))
    model.save_pretrained(tmp_path / "doge")
    make_tokenizer().save_pretrained(tmp_path / "doge")
    result = run("doctor", tmp_path / "doge", "--device", "cpu", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert said["ok"] is False
    (bad,) = [finding for finding in said["findings"] if not finding["ok"]]
    assert bad["name"] == "doge"
    assert bad["text"].startswith("no residual stream found")


def test_a_version_that_is_not_supported() -> None:
    found = {f.name: f for f in doctor.versions(["torch<2.0,>=1.0", "numpy>=1", "triton_x>=1"])}
    assert found["numpy"].ok
    assert not found["torch"].ok
    assert found["torch"].text.endswith("supported is <2.0,>=1.0: pip install 'torch<2.0,>=1.0'")


def test_without_a_compiler_it_says_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaskip_fx.utils.torch_internals.find_cpp_compiler", lambda: None)
    result = run("doctor", "--device", "cpu")
    assert result.exit_code == 1
    assert "NOT compiler" in result.stdout
    assert "no C++ compiler was found" in result.stdout


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "no such folder" in refused(run("doctor", tmp_path / "none", "--device", "cpu"))
