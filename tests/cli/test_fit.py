"""``adaskip-fx fit``: a plan from texts, and what it refuses before minutes of work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import adaskip_fx
from adaskip_fx import SkipPlan
from adaskip_fx.latency.table import LatencyTable, device_name
from adaskip_fx.latency.terms import Costs
from adaskip_fx.profiles.fingerprint import fingerprint
from tests.support.command_line import (
    SUBLAYERS,
    make_model,
    make_tokenizer,
    misused,
    refused,
    run,
    save,
)

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
    for said in ("write 2 samples", "search", "fit 1 surrogates", "distilled:", f"saved to {out}"):
        assert said in result.stderr
    return out


@pytest.mark.slow
def test_the_plan_is_saved_and_can_be_run(folder: Path, profile: Path, fitted: Path) -> None:
    plan = SkipPlan.load(fitted)
    assert len(plan.skipped("prefill")) == 1
    assert {plan.surrogates.by_sublayer[s].kind for s in plan.prefill} == {"linear"}
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


@pytest.mark.slow
def test_fit_as_json(folder: Path, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    quick = ("--max-length", 128, "--samples", 3, "--own", 0, "--steps", 0, "--no-search")
    result = run("fit", folder, profile, out, *quick, "--kind", "scale", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said.pop("saved_to"), said.pop("kind")) == (str(out), "plan")
    assert said == SkipPlan.load(out).to_json()


@pytest.mark.slow
def test_without_texts_or_a_search(folder: Path, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    quick = ("--max-length", 128, "--samples", 3, "--own", 0, "--steps", 0, "--no-search")
    result = run("fit", folder, profile, out, *quick, "--kind", "low_rank", "--rank", 2)
    assert result.exit_code == 0, result.stderr
    assert "search\n" not in result.stderr
    at_once = run("fit", folder, profile, tmp_path / "b.json", *quick, "--at-once")
    assert at_once.exit_code == 0, at_once.stderr
    assert SkipPlan.load(tmp_path / "b.json").surrogates.kinds == "normalized"
    plan = SkipPlan.load(out)
    wanted = adaskip_fx.AdaSkip().plan(adaskip_fx.Profile.load(profile), 1.2)
    assert plan.prefill == wanted.prefill
    assert {plan.surrogates.by_sublayer[s].rank for s in plan.prefill} == {2}


def table_of(folder: Path, **conditions: object) -> Path:
    """Of times that were made up: rank 1 takes a 32nd of a sublayer, rank 2 a 16th."""
    model, out = make_model(), folder / "table.json"
    seconds = {"rest": 1.0, "attention": 16.0, "ffn": 16.0, "scale": 0.5, "linear": 4.0}
    seconds |= {f"low_rank {rank}": rank / 2 for rank in (1, 2, 4)}
    costs = (Costs("prefill", 2048, seconds, 0.25), Costs("decode", 2048, seconds))
    about = {"device": device_name(model), "dtype": "float32", **conditions}
    classes = tuple(s.kind for s in SUBLAYERS)
    LatencyTable(fingerprint(model), about, SUBLAYERS, classes, costs).save(out)
    return out


@pytest.mark.slow
def test_ranks_by_measured_time(folder: Path, profile: Path, tmp_path: Path) -> None:
    table, out = table_of(tmp_path), tmp_path / "plan.json"
    quick = ("--max-length", 128, "--samples", 3, "--own", 0, "--steps", 0, "--no-search")
    for share, rank in ((0.03125, 1), (0.0625, 2)):
        bound = ("--within", share, "--table", table, "--context", 2048)
        result = run("fit", folder, profile, out, *quick, "--kind", "low_rank", *bound)
        assert result.exit_code == 0, result.stderr
        assert "the sum of cost terms is off by 25.0%" in result.stderr
        plan = SkipPlan.load(out)
        assert [plan.surrogates.by_sublayer[s].rank for s in plan.prefill] == [rank]
    other = table_of(tmp_path, device="Some GPU")
    bound = ("--within", 0.125, "--table", other, "--context", 2048)
    line = refused(run("fit", folder, profile, out, *quick, "--kind", "low_rank", *bound))
    assert "the table was measured with device Some GPU, but the model has CPU" in line


BOUND = ("--table", "{table}", "--context", 2048)
MISUSED = [
    (("--text", "book.txt"), "--text book.txt: write NAME=PATH, for example --text prose=book.txt"),
    (("--text", "a={book}", "--text", "a={book}"), "a was given before; name each kind once"),
    (("--within", 0.1), "--within, --table and --context go together: a share of a sublayer's"),
    (("--context", 2048), "and the tokens of a typical request"),
    (("--phase", "decode"), "the file that adaskip-fx measure --ranks wrote, and"),
    (("--kind", "cubic"), "Invalid value for '--kind'"),
]
REFUSED = [
    (("--kind", "linear", "--rank", 3), "rank must be at least 1, and of low_rank, got 3"),
    ((*BOUND, "--within", 0.1), "a latency bound is for a low_rank without a rank, got normalized"),
    ((*BOUND, "--within", 2), "share must be above 0 and at most 1, of a sublayer's time; got 2.0"),
    (
        (*BOUND, "--within", 0.001),
        "no low-rank surrogate takes at most 0.001 of the time of attent",
    ),
]


@pytest.mark.parametrize("arguments", [*MISUSED, *REFUSED])
def test_bad_options_are_refused_at_once(
    folder: Path,
    profile: Path,
    book: Path,
    tmp_path: Path,
    arguments: tuple[tuple[object, ...], str],
) -> None:
    options, message = arguments
    paths = {"{book}": str(book), "{table}": str(table_of(tmp_path))}
    filled = [re.sub(r"{\w+}", lambda found: paths[found[0]], str(o)) for o in options]
    result = run("fit", folder, profile, tmp_path / "plan.json", *filled)
    assert message in (misused if arguments in MISUSED else refused)(result)


def test_a_place_that_is_no_file_is_refused(folder: Path, profile: Path, tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "nowhere" / "plan.json"):
        line = refused(run("fit", folder, profile, out))
        assert "a plan is a file in a folder that exists; choose another" in line
