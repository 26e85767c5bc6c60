"""A folder that was exported, loaded by plain transformers, against the hooked eager model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging

from adaskip_fx.checkpoint import ExportedCheckpoint, export, export_checkpoint
from adaskip_fx.checkpoint.layout import Layout
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_passes import UnsupportedError
from tests.support.checkpoints import (
    IDS,
    compiled_once,
    loaded_logits,
    model_of,
    sublayers,
    without,
)
from tests.support.command_line import make_tokenizer
from tests.support.eager_reference import Oracle, relative_error
from tests.support.eager_windows import WindowedEager

#: What is skipped of three layers: two halves that become one layer, a whole one, halves that stay.
SKIPPED = (("0.ffn", "1.attention"), ("1.attention", "1.ffn"), ("0.attention", "2.ffn"))
#: One with norms in front of branches, one with Conv1D, one in parallel, one with norms around.
OFTEN = ("llama", "gpt2", "cohere", "gemma3")
SELDOM = (
    *("mistral, sliding window", "qwen2", "qwen3", "smollm3", "starcoder2", "granite", "phi3"),
    *("stablelm", "olmo", "apertus", "persimmon", "opt", "gpt_neox", "gpt_neox, sequential"),
    *("glm4", "olmo2", "exaone4", "gptj", "phi", "cohere2", "falcon, new decoder"),
)
PARALLEL = ("cohere", "cohere2", "gpt_neox", "gptj", "phi", "falcon, new decoder")
EXPERTS = ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe")


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(export, "build", compiled_once)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def exported(
    family: str, folder: Path, skipped: tuple[str, ...], model: Any = None, **options: Any
) -> ExportedCheckpoint:
    model = model if model is not None else model_of(family)
    plan = SkipPlan.of(sublayers(family, model), skipped)
    return export_checkpoint(model, plan, folder, **options)


# Whole families --------------------------------------------------------------------------------


def check_family(family: str, folder: Path, dtype: torch.dtype, allowed: float) -> None:
    model = model_of(family, dtype)
    for number, skipped in enumerate(SKIPPED):
        target = folder / str(number)
        result = exported(family, target, skipped, model)
        halves = 3 if number == 2 or (family in PARALLEL and number == 0) else 2
        assert result.layers == json.loads((target / "config.json").read_text()).get(
            model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        )
        assert result.layers == halves
        assert [str(s) for s in result.zeros] == (list(skipped) if halves == 3 else [])
        got, want = loaded_logits(target, model), without(family, model, skipped)
        assert relative_error(got, want) <= allowed


@pytest.mark.parametrize(
    "family", [*OFTEN, *(pytest.param(f, marks=pytest.mark.slow) for f in SELDOM)]
)
def test_a_family(family: str, tmp_path: Path) -> None:
    # (When it is loaded, GPT-J makes its table of positions in another dtype.)
    check_family(family, tmp_path, torch.float64, 1e-8 if family == "gptj" else 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPERTS)
def test_experts(family: str, tmp_path: Path) -> None:
    """In float32: transformers' grouped products take no float64."""
    check_family(family, tmp_path, torch.float32, 1e-5)


def test_another_sublayer_would_be_seen() -> None:
    """The companion: what is compared depends on which sublayers are left out, and how."""
    for family in OFTEN:
        model = model_of(family)
        one, other = (without(family, model, [name]) for name in ("1.ffn", "1.attention"))
        assert relative_error(one, other) > 1e-3
        assert relative_error(one, without(family, model, [])) > 1e-3


@pytest.mark.breaks
def test_what_does_not_fold_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: parallel branches of two layers are no layer, and the check says so."""
    right = export.layout_of

    def wrong(model: Any) -> Layout:
        layout = right(model)
        return Layout(layout.layers, layout.parts, parallel=False)

    monkeypatch.setattr(export, "layout_of", wrong)
    with pytest.raises(UnsupportedError, match="gives other logits than the plan: they differ by"):
        exported("cohere", tmp_path / "new", SKIPPED[0])
    assert not list(tmp_path.iterdir())


# What else is in the folder --------------------------------------------------------------------


def test_tied_embeddings_and_what_lies_beside_weights(tmp_path: Path) -> None:
    model = model_of("gpt2")
    assert model.config.tie_word_embeddings
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=3)
    result = exported("gpt2", tmp_path / "new", SKIPPED[1], tokenizer=make_tokenizer("{{ 1 }}"))
    assert GenerationConfig.from_pretrained(result.folder).top_k == 3
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    assert tokenizer.chat_template == "{{ 1 }}"
    assert tokenizer("ab").input_ids == make_tokenizer()("ab").input_ids
    import safetensors

    with safetensors.safe_open(result.folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert sum(name.endswith(("wte.weight", "lm_head.weight")) for name in names) == 1
    assert not any(".h.2." in name for name in names)
    after = model.state_dict()
    assert model.config.num_hidden_layers == 3
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_is_left_of_a_layer_is_named_for_transformers(tmp_path: Path) -> None:
    result = exported("llama", tmp_path / "new", SKIPPED[2], per_layer_config=True)
    config = json.loads((result.folder / "config.json").read_text())
    assert config["per_layer_config"] == {"0": {"skip": ["attention"]}, "2": {"skip": ["mlp"]}}
    model = model_of("llama")
    got = loaded_logits(result.folder, model)
    assert relative_error(got, without("llama", model, SKIPPED[2])) <= 1e-10


def test_transformers_does_not_skip_by_itself(tmp_path: Path) -> None:
    """Why zeros are written as well: once this fails, a layer need not run them."""
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "per_layer_config": {"0": {"skip": ["mlp"]}}}))
    assert relative_error(loaded_logits(tmp_path, model), without("llama", model, [])) <= 1e-10


def test_what_was_done_is_said(tmp_path: Path) -> None:
    result = exported("llama", tmp_path / "new", ("0.ffn", "1.attention", "2.ffn"))
    first, second = str(result).splitlines()
    assert first.startswith(f"{tmp_path / 'new'}: 2 decoder layers of 3; its logits differ from ")
    assert second == "zeros, which save no time and no memory: 2.ffn"


# Windows ---------------------------------------------------------------------------------------


def windowed(family: str, folder: Path, tokens: dict[int, int], **changes: Any) -> Any:
    """A checkpoint of a plan with windows, and what it and the reference give."""
    model = model_of(family, **changes)
    plan = SkipPlan.of(sublayers(family, model), ["1.ffn"]).with_windows(
        Windows.of({f"{i}.attention": Window(n, sinks=0) for i, n in tokens.items()})
    )
    result = export_checkpoint(model, plan, folder)
    reference = WindowedEager(model)
    reference.model.model.layers[1].mlp.register_forward_hook(lambda *a: torch.zeros_like(a[2]))
    seen = [{layer: (0, n, ()) for layer, n in tokens.items()}] * IDS.shape[1]
    return result, loaded_logits(folder, model), reference.logits(IDS, [0], seen)


@pytest.mark.slow
def test_a_window_of_every_layer(tmp_path: Path) -> None:
    result, got, want = windowed("mistral", tmp_path / "new", dict.fromkeys(range(3), 5))
    assert relative_error(got, want) <= 1e-10
    assert json.loads((result.folder / "config.json").read_text())["sliding_window"] == 5
    near = WindowedEager(model_of("mistral")).logits(IDS, [0], [{0: (0, 6, ())}] * 20)
    assert relative_error(got, near) > 1e-3  # one token more in one layer would be seen


def test_a_window_of_one_layer(tmp_path: Path) -> None:
    result, got, want = windowed("qwen3", tmp_path / "new", {2: 5})
    assert relative_error(got, want) <= 1e-10
    config = json.loads((result.folder / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    assert "sliding windows: 2.attention 5" in str(result)


# Scales ----------------------------------------------------------------------------------------

FACTORS = {"0.ffn": 1.3, "1.attention": 0.8, "2.attention": 1.1}


def scaled(folder: Path, **changes: float) -> tuple[ExportedCheckpoint, float]:
    """A checkpoint with scales folded in, and how far it is from a Llama that is written out."""
    model = model_of("llama", **changes)
    plan = SkipPlan.of(sublayers("llama", model), FACTORS)
    factors = {s: FACTORS[str(s)] for s in plan.prefill}
    plan = plan.with_surrogates(Surrogates.scale(factors))
    result = export_checkpoint(model, plan, folder, fold_scales=True)
    oracle = Oracle(model).behave(dict.fromkeys(FACTORS, "skip"), factors=FACTORS)
    with torch.no_grad():
        want = oracle.model(input_ids=IDS, use_cache=False).logits
    return result, relative_error(loaded_logits(folder, model), want)


def test_scales_fold_but_for_epsilon(tmp_path: Path) -> None:
    result, error = scaled(tmp_path / "none")
    assert error <= 1e-6  # the reference scales in float32, as the compiled model does
    assert result.error <= 1e-6
    assert "scales folded into weights: 0.ffn, 1.attention, 2.attention" in str(result)


@pytest.mark.slow
def test_epsilon_is_what_scales_are_off_by(tmp_path: Path) -> None:
    some, error = scaled(tmp_path / "some", rms_norm_eps=1e-4)
    assert 1e-6 < error < 1e-2
    assert some.error == pytest.approx(error, rel=3)
    with pytest.raises(UnsupportedError, match=r"differ by .* allowed 1e-02; nothing was written"):
        scaled(tmp_path / "more", rms_norm_eps=0.1)
