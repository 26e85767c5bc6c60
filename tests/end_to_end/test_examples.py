"""The scripts in `examples/` run on a tiny model and print what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from adaskip_fx.checkpoint import export, export_checkpoint
from adaskip_fx.plans.skip_plan import SkipPlan
from tests.support.checkpoints import IDS, compiled_once, model_of, sublayers, without
from tests.support.command_line import save
from tests.support.eager_reference import relative_error

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 8)
    return save(folder / "model", layers=4)


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_question_answering(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(folder.parent / "text.txt")
    arguments = [str(folder), text, "What jumps?", "--tokens", "3", "--alpha", "1.5"]
    load("question_answering").main([*arguments, "--backend", "eager"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("as it is (")
    assert any(line.startswith("skipped (") for line in lines)


def test_chat(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(folder.parent / "text.txt")
    turns = ["--turn", "Hello.", "--turn", "More?", "--tokens", "3", "--alpha", "1.5"]
    load("chat").main([str(folder), "--learn-from", text, *turns, "--backend", "eager"])
    said = capsys.readouterr().out
    assert said.index("> Hello.") < said.index("> More?")
    assert "tokens stored" in said


@pytest.mark.slow
def test_own_policy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(folder.parent / "text.txt")
    load("own_policy").main([str(folder), text, "--alpha", "1.6", "--backend", "eager"])
    assert "skips 3 of 8" in capsys.readouterr().out


@pytest.mark.slow
def test_a_second_plan_compiles_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    load("own_backend").main()
    first, second, *pieces = capsys.readouterr().out.splitlines()
    assert first.startswith("skips 2.attention, 3.ffn: ")
    assert second.startswith("skips 3.attention, 4.ffn: ")
    assert first.split(": ")[1] == second.split(": ")[1]
    assert any("silu" in piece or "linear" in piece for piece in pieces)


def test_a_frozen_plan_as_an_exported_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program gives what the hooked eager model does, and has the layers that are left."""
    monkeypatch.setattr(export, "build", compiled_once)
    model, skipped = model_of("llama"), ("0.ffn", "1.attention")
    plan = SkipPlan.of(sublayers("llama", model), skipped)
    export_checkpoint(model, plan, tmp_path / "smaller")
    load("torch_export").main([str(tmp_path / "smaller"), str(tmp_path / "program.pt2")])
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'program.pt2'}: 15 linear layers; the largest difference")
    program = torch.export.load(tmp_path / "program.pt2").module()
    got, want = program(IDS).detach(), without("llama", model, skipped)
    assert relative_error(got, want) <= 1e-10
    assert relative_error(got, without("llama", model, skipped[:1])) > 1e-3
