"""``adaskip-fx generate``: the answer, streamed or as JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import adaskip_fx
from adaskip_fx.cli.generate import Answer
from adaskip_fx.policies import AdaSkip
from tests.support.command_line import make_model, make_tokenizer, misused, refused, run, save


def test_generate_streams_what_the_compiled_model_generates(folder: Path, profile: Path) -> None:
    result = run(
        *("generate", folder, profile, "A prompt", "--backend", "eager"),
        *("--alpha", 1.5, "--max-new-tokens", 24, "--stats"),
    )
    assert result.exit_code == 0, result.stderr
    model, tokenizer = make_model(), make_tokenizer()
    fast = adaskip_fx.compile(model, profile, 1.5, backend="eager")
    ids = tokenizer("A prompt", return_tensors="pt")["input_ids"]
    output = fast.generate(ids, max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert result.stdout == expected + "\n"
    unskipped = model.generate(ids, max_new_tokens=24, do_sample=False)
    assert output.tolist() != unskipped.tolist()  # the plan made a difference
    assert f"plan {fast.adaskip.plan.digest[:8]}" in result.stderr
    assert "window closed after 20" in result.stderr


@pytest.mark.parametrize(
    "options",
    [("--lossless",), pytest.param(("--max-divergence", 1e-9), marks=pytest.mark.slow)],
)
def test_generate_as_the_full_model(folder: Path, profile: Path, options: tuple[Any, ...]) -> None:
    start = ("generate", folder, profile, "A prompt", "--backend", "eager", "--alpha", 1.5)
    result = run(*start, "--max-new-tokens", 12, "--stats", "--json", *options)
    assert result.exit_code == 0, result.stderr
    model, tokenizer = make_model(), make_tokenizer()
    ids = tokenizer("A prompt", return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=12, do_sample=False)
    told = json.loads(result.stdout)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert told["text"] == expected
    assert told["tokens_per_step"] >= 1
    assert "tokens a step" in result.stderr
    assert "12 tokens in " in result.stderr, "an event of the request"
    if options[0] != "--lossless":
        assert "nats a token in the worst row, of at most 1e-09" in result.stderr
    both = run(*start, "--lossless", "--max-divergence", 0.1)
    assert "--lossless or --max-divergence" in misused(both)


def test_generate_verifies_a_share_of_the_blocks(folder: Path, profile: Path) -> None:
    start = ("generate", folder, profile, "A prompt", "--backend", "eager", "--alpha", 1.5)
    alone = run(*start, "--verify-share", 0.5)
    assert "--verify-share is for --max-divergence" in misused(alone)
    within = (*start, "--max-divergence", 0.1, "--verify-share")
    assert "must be above 0 and at most 1, got 1.5" in misused(run(*within, 1.5))
    assert "but the plan skips attention" in refused(run(*within, 0.5))


def test_generate_with_a_plan_for_time(folder: Path, profile: Path, tmp_path: Path) -> None:
    start = ("generate", folder, profile, "A prompt", "--backend", "eager")
    result = run(*start, "--alpha", 1.2, "--context", 300, "--max-new-tokens", 2, "--stats")
    assert result.exit_code == 0, result.stderr
    assert "predicted at 300 tokens: prefill 1." in result.stderr
    absent = run(*start, "--context", 300, "--table", tmp_path / "absent.json")
    assert "absent.json" in refused(absent)


def test_generate_reads_a_file_or_standard_input(
    folder: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def answer_prompt(
        _loaded: Any, _profile: Any, prompt: str, **options: Any
    ) -> tuple[Answer, str]:
        seen.append((prompt, options))
        return Answer("tiny", "digest", "text", 1, 2, 0.5), "stats"

    monkeypatch.setattr("adaskip_fx.cli.generate.answer_prompt", answer_prompt)
    file = tmp_path / "prompt.txt"
    file.write_text("from a file")
    start = ("generate", folder, profile)
    assert run(*start, "--prompt-file", file, "--backend", "eager").exit_code == 0
    piped = run(*start, "--prompt-file", "-", "--no-chat", "--json", text="from a pipe")
    assert piped.exit_code == 0
    assert json.loads(piped.stdout)["text"] == "text"
    assert [prompt for prompt, _ in seen] == ["from a file", "from a pipe"]
    assert seen[0][1] == {
        **{"alpha": 1.2, "limit": 64, "plan": None},
        **{"context": None, "table": None},
        **{"backend": "eager", "chat": True, "stream": True},
    }
    assert (seen[1][1]["chat"], seen[1][1]["stream"]) == (False, False)
    both = "give a prompt, either as argument or with --prompt-file"
    assert both in misused(run(*start))
    assert both in misused(run(*start, "both", "--prompt-file", file))
    assert len(seen) == 2


@pytest.mark.slow
def test_generate_as_json(folder: Path, profile: Path) -> None:
    start = ("generate", folder, profile, "A prompt", "--backend", "eager", "--alpha", 1.5)
    told = run(*start, "--max-new-tokens", 4)
    result = run(*start, "--max-new-tokens", 4, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["text"] + "\n" == told.stdout
    assert (said["model"], said["prompt_tokens"]) == (folder.name, len("A prompt"))
    assert said["new_tokens"] == 4
    plan = AdaSkip().plan(adaskip_fx.Profile.load(profile), 1.5)
    assert said["plan"] == plan.digest


def test_generate_refuses(
    folder: Path, profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    start = ("generate", folder, profile)
    assert "Invalid value for '--alpha'" in misused(run(*start, "x", "--alpha", 0.5))
    assert "unknown backend 'gcc'" in refused(run(*start, "x", "--backend", "gcc"))
    assert "no such folder" in refused(run("generate", folder, "nowhere", "x"))
    larger = save(tmp_path_factory.mktemp("larger"), layers=3)
    line = refused(run("generate", larger, profile, "x", "--backend", "eager"))
    assert str(adaskip_fx.Profile.load(profile).fingerprint) in line
    assert "but the model is" in line


def test_debug_shows_the_traceback(folder: Path, profile: Path) -> None:
    result = run("generate", folder, profile, "x", "--backend", "gcc", "--debug")
    assert type(result.exception) is ValueError
    assert "error:" not in result.stderr
