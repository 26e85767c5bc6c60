"""``adaskip-fx demo`` on a tiny model: what it measures, and that the tables say what JSON says."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import Result

from adaskip_fx.cli.demo import run as demo
from adaskip_fx.cli.demo.run import DemoResult
from adaskip_fx.cli.demo.show import show
from adaskip_fx.data.reference_text import demo_texts
from tests.support.command_line import SUBLAYERS, make_model, make_tokenizer, run

NEW_TOKENS = 32
Demonstrated = tuple[Result, DemoResult]


@pytest.fixture(scope="module")
def demonstrated(folder: Path) -> Demonstrated:
    """``demo --json`` on the tiny model, with the result that it printed."""
    kept: list[DemoResult] = []
    real = demo.run_demo

    def spy(*arguments: Any, **options: Any) -> DemoResult:
        kept.append(real(*arguments, **options))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_demo", spy)
        printed = run("demo", "--model", folder, "--backend", "eager", "--alpha", 1.5, "--json")
    assert printed.exit_code == 0, printed.stderr
    return printed, kept[0]


def test_the_demo_prints_one_json_object(demonstrated: Demonstrated) -> None:
    printed, result = demonstrated
    data = json.loads(printed.stdout)
    assert data == json.loads(json.dumps(result.to_json()))
    assert set(data) == {
        *("conditions", "seconds", "profile", "plan", "learned", "passkeys", "results"),
        *("times", "counts", "new_plans"),
    }
    assert {*("alpha", "backend", "device", "dtype", "seed", "threads", "torch", "model")} <= set(
        data["conditions"]
    )
    assert data["conditions"]["alpha"] == 1.5
    assert min(data["conditions"]["prompt_tokens"]) >= 2000
    assert set(data["seconds"]) == {
        title.removesuffix(" ...")
        for title in printed.stderr.splitlines()
        if title.endswith(" ...") and title != "load the model ..."
    } | {"load the model"}


def test_answers_are_those_of_generate_and_of_one_text_each(demonstrated: Demonstrated) -> None:
    _, result = demonstrated
    model, tokenizer = make_model(), make_tokenizer()
    texts = demo_texts(
        tokenizer, calibration=(6, 1024), prompts=5, prompt_tokens=2000, held_out=(2, 768), seed=0
    )
    assert result.passkeys == texts.passkeys

    ids = torch.tensor([texts.passkeys[0].ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    as_is, skipped, fitted = (result.results[n]["passkey"] for n in ("as_is", "skipped", "fitted"))
    assert as_is.answers[0] == text
    assert len({as_is.answers, skipped.answers, fitted.answers}) == 3
    for task in (as_is, skipped, fitted):
        found = [p.key in a for p, a in zip(texts.passkeys, task.answers, strict=True)]
        assert task.scores.values == tuple(map(float, found))


def test_perplexity_is_that_of_the_models_own_loss(demonstrated: Demonstrated) -> None:

    _, result = demonstrated
    tokenizer = make_tokenizer()
    texts = demo_texts(
        tokenizer, calibration=(6, 1024), prompts=5, prompt_tokens=2000, held_out=(2, 768), seed=0
    )
    model, losses = make_model(), []
    with torch.no_grad():
        for window in texts.held_out:
            ids = torch.tensor([window])
            losses.append(model(ids, labels=ids).loss)
    expected = float(torch.stack(losses).mean().exp())
    assert set(result.results["as_is"]) == {"passkey"}
    for name in ("skipped", "fitted"):
        task = result.results[name]["perplexity"]
        assert task.reference is not None
        assert task.reference.mean == pytest.approx(expected, rel=1e-5)
        assert task.scores.mean != pytest.approx(expected, rel=1e-4)
        assert sum(b.tokens for b in task.buckets) == 2 * 767


def test_what_was_skipped_was_really_left_out(demonstrated: Demonstrated) -> None:
    _, result = demonstrated
    assert len(result.plan.skipped("prefill")) == 1  # of 4 at alpha 1.5
    for name in ("skipped", "fitted"):
        ran = result.results[name]["passkey"].ran
        assert ran is not None
        assert ran.prefill.fraction == 0.25
        assert ran.prefill.steps == 5
    assert result.results["as_is"]["passkey"].ran is None
    for learned in result.learned:
        assert learned.prefill == result.plan.prefill
        assert learned != result.plan


def test_everything_is_timed_in_every_round(demonstrated: Demonstrated) -> None:
    _, result = demonstrated
    names = ("eager", "nothing skipped", "skipped", "fitted")
    assert [(t.phase, t.contender) for t in result.times] == [
        (phase, name) for phase in ("prefill", "decode") for name in names
    ]
    for time in result.times:
        assert time.context == 2000
        assert len(time.seconds) == 3
        assert min(time.seconds) > 0


def test_new_plans_compile_nothing(demonstrated: Demonstrated) -> None:
    _, result = demonstrated
    assert len(result.link_seconds) >= 1
    assert all(seconds > 0 for seconds in result.link_seconds)
    assert result.pieces_for_new_plans == 0
    assert set(result.counts) == {"captures", "pieces", "links"}


def text_of(result: DemoResult) -> str:
    output = io.StringIO()
    show(result, Console(width=100, file=output))
    return output.getvalue()


def test_the_tables_say_what_the_json_says(demonstrated: Demonstrated) -> None:
    _, result = demonstrated
    printed, data = text_of(result), result.to_json()
    assert all(len(line) <= 100 for line in printed.splitlines())
    assert "\x1b" not in printed
    for row in data["profile"]["sublayers"]:
        assert f"{row['similarity']:.4f}" in printed
    assert f"{result.plan.digest[:8]} skips 1 of 4 sublayers" in printed
    found = [f"{sum(r['passkey']['values']):.0f} of 5" for r in data["results"].values()]
    assert re.search(r"^found\s+" + r"\s+".join(found), printed, re.M)
    for name in ("skipped", "fitted"):
        judged = data["results"][name]["perplexity"]
        full = judged["reference"]["mean"]
        (bucket,) = judged["buckets"]
        row = f"{judged['mean']:.2f}", f"{judged['mean'] / full:.3f}", f"{bucket['agreement']:.3f}"
        assert re.search(rf"^{name}\s+" + r"\s+".join(row), printed, re.M)
        assert re.search(rf"^as is\s+{full:.2f}", printed, re.M)
    medians = [t["median"] for t in data["times"] if t["phase"] == "prefill"]
    row = r"\D+2,000\s+" + r"[^s]+".join(f"{seconds:.3f}" for seconds in medians)
    assert re.search(r"^prompt" + row.replace(r"[^s]+", r" s [^s]*"), printed, re.M)
    assert f"{data['counts']['links']} programs linked" in printed


def test_a_plan_that_was_learned_is_shown(demonstrated: Demonstrated) -> None:
    _, result = demonstrated
    extra = next(s for s in SUBLAYERS if s.kind == "ffn" and s not in result.plan.prefill)
    learned = result.plan.with_decode_extra([extra])
    printed = text_of(dataclasses.replace(result, learned=(learned,)))
    assert "decode may skip it" in printed
    assert f"{learned.digest[:8]} also skips ffn {extra.layer}\n" in printed
    assert "decode may skip it" not in text_of(dataclasses.replace(result, learned=()))
