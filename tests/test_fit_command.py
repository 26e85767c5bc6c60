"""``adaskip-fx fit``: a plan from texts, and what it refuses before minutes of work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import adaskip_fx
from adaskip_fx import SkipPlan
from tests.test_cli import make_model, make_tokenizer, refused, run, save

QUICK = ("--max-length", 160, "--samples", 4, "--own", 2, "--steps", 2, "--alpha", 1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def profile(folder: Path) -> Path:
    out = folder.parent / "fit.adaskip"
    assert run("calibrate", folder, out, "--max-length", 64, "--samples", 2).exit_code == 0
    return out


@pytest.fixture(scope="module")
def book(folder: Path) -> Path:
    file = folder.parent / "book.txt"
    file.write_text("It was the best of tests, it was the worst of tests.\n" * 120)
    return file


@pytest.fixture(scope="module")
def fitted(folder: Path, profile: Path, book: Path) -> Path:
    out = folder.parent / "plan.json"
    result = run("fit", folder, profile, out, *QUICK, "--text", f"prose={book}", "--kind", "linear")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("SkipPlan ")
    for said in ("write 2 samples", "search", "fit 1 stand-ins", "refined:", f"saved to {out}"):
        assert said in result.stderr
    return out


def test_the_plan_is_saved_and_can_be_run(folder: Path, profile: Path, fitted: Path) -> None:
    plan = SkipPlan.load(fitted)
    assert len(plan.skipped("prefill")) == 1
    assert {plan.compensation.stand_ins[s].kind for s in plan.prefill} == {"linear"}
    result = run(
        *("generate", folder, profile, "A prompt", "--backend", "eager", "--stats"),
        *("--plan", fitted, "--max-new-tokens", 4),
    )
    assert result.exit_code == 0, result.stderr
    assert f"plan {plan.digest[:8]}" in result.stderr
    fast = adaskip_fx.compile(make_model(), plan=fitted, backend="eager")
    ids = make_tokenizer()("A prompt", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = fast.generate(ids, max_new_tokens=4, do_sample=False)
    text = make_tokenizer().decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert result.stdout == text + "\n"


def test_without_texts_or_a_search(folder: Path, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    quick = ("--max-length", 128, "--samples", 3, "--own", 0, "--steps", 0, "--no-search")
    result = run("fit", folder, profile, out, *quick, "--kind", "low_rank", "--rank", 2)
    assert result.exit_code == 0, result.stderr
    assert "search\n" not in result.stderr
    plan = SkipPlan.load(out)
    wanted = adaskip_fx.Profile.load(profile).preview(1.2)
    assert plan.prefill == wanted.prefill
    assert {plan.compensation.stand_ins[s].rank for s in plan.prefill} == {2}


BAD = [
    (("--text", "book.txt"), "--text book.txt: write NAME=PATH, for example --text prose=book.txt"),
    (("--text", "a={book}", "--text", "a={book}"), "a was given before; name each kind once"),
    (("--kind", "linear", "--rank", 3), "rank must be at least 1, and of low_rank, got 3"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_options_are_refused_at_once(
    folder: Path,
    profile: Path,
    book: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    given = [str(a).replace("{book}", str(book)) for a in arguments]
    line = refused(run("fit", folder, profile, tmp_path / "plan.json", *given))
    assert re.search(re.escape(message), line)


def test_a_place_that_is_no_file_is_refused(folder: Path, profile: Path, tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "nowhere" / "plan.json"):
        line = refused(run("fit", folder, profile, out))
        assert "a plan is a file in a folder that exists; choose another" in line
