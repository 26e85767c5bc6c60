"""What does not become a plain checkpoint, by the words that say so."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from adaskip_fx.checkpoint import export_checkpoint
from adaskip_fx.checkpoint.foldable import foldable
from adaskip_fx.checkpoint.layout import layout_of
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.phase_split import decode_only
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_passes import UnsupportedError
from tests.support.checkpoints import model_of, sublayers
from tests.support.surrogates import surrogate

SKIPPED = SkipPlan.of(sublayers("llama", model_of("llama")), ["1.ffn"])
FFN = SKIPPED.sublayers[3]


def windows(tokens: int, *names: str, **more: Any) -> Windows:
    return Windows.of(dict.fromkeys(names, Window(tokens, **{"sinks": 0, **more})))


def refused(family: str, plan: SkipPlan, folder: Path, **changes: Any) -> str:
    """Why a plan is refused before anything is compiled or written."""
    model = model_of(family, **changes)
    with pytest.raises(UnsupportedError) as caught:
        export_checkpoint(model, plan, folder / "new", fold_scales=True)
    assert not list(folder.iterdir())
    return str(caught.value)


# Plans -----------------------------------------------------------------------------------------


def test_a_plan_that_differs_by_phase() -> None:
    message = r"1\.ffn: run in prefill but skip in decode; a checkpoint has no phases, .* the same"
    with pytest.raises(PlanError, match=message):
        foldable(decode_only(SKIPPED), fold_scales=False)
    shown = SKIPPED.with_windows(Windows(decode=windows(5, "0.attention").decode))
    with pytest.raises(PlanError, match=r"0\.attention: run in prefill but window 0\+5 in decode"):
        foldable(shown, fold_scales=False)


def test_several_plans() -> None:
    with pytest.raises(TypeError, match="a checkpoint is of one plan, got Schedule; export one of"):
        foldable(Schedule(((0, SKIPPED),)), fold_scales=False)


def test_surrogates() -> None:
    linear = SKIPPED.with_surrogates(Surrogates({FFN: surrogate("linear", hidden=32)}))
    with pytest.raises(
        UnsupportedError, match=r"1\.ffn: .* no place for its linear surrogate; exp"
    ):
        foldable(linear, fold_scales=True)
    scaled = SKIPPED.with_surrogates(Surrogates.scale({FFN: 1.25}))
    with pytest.raises(UnsupportedError, match=r"1\.ffn: its scale 1\.25 can .* \(--fold-scales\)"):
        foldable(scaled, fold_scales=False)


def test_what_runs_needs_no_surrogate_and_a_scale_of_one_is_none() -> None:
    """The companion: the same surrogates where they say nothing are taken."""
    attention = SKIPPED.sublayers[2]
    idle = SKIPPED.with_surrogates(Surrogates({attention: surrogate("linear", hidden=32)}))
    assert not foldable(idle, fold_scales=False).divisors
    one = SKIPPED.with_surrogates(Surrogates.scale({FFN: 1.0}))
    assert not foldable(one, fold_scales=False).divisors
    folded = foldable(SKIPPED.with_surrogates(Surrogates.scale({FFN: 1.25})), fold_scales=True)
    assert folded.divisors == {(2, "attention"): 1.25, (2, "ffn"): 1.25}


def test_windows_with_sinks_or_of_some_heads() -> None:
    for more, said in (({"sinks": 4}, "4 sinks"), ({"full_heads": (0,)}, "K/V heads that see")):
        shown = SKIPPED.with_windows(windows(5, "0.attention", **more))
        with pytest.raises(UnsupportedError, match=f"0.attention: window .* has {said}.*--sinks 0"):
            foldable(shown, fold_scales=False)


# Models ----------------------------------------------------------------------------------------


def test_windows_that_an_architecture_has_no_words_for(tmp_path: Path) -> None:
    shown = SKIPPED.with_windows(windows(5, "0.attention"))
    message = refused("llama", shown, tmp_path)
    assert "0.attention: window 0+5 cannot be said in a plain checkpoint, because a" in message
    assert "a LlamaConfig has no sliding_window; run the plan with adaskip_fx.compile" in message
    message = refused("mistral", shown, tmp_path)
    assert "a MistralConfig has one window for all, here they are 5, all tokens" in message
    two = windows(5, "0.attention"), windows(6, "2.attention")
    shown = SKIPPED.with_windows(Windows.of({**two[0].prefill, **two[1].prefill}))
    assert "one window for all, here they are 5, 6 tokens" in refused("qwen3", shown, tmp_path)


def test_scales_where_norms_are_behind_branches(tmp_path: Path) -> None:
    scaled = SKIPPED.with_surrogates(Surrogates.scale({FFN: 1.25}))
    message = refused("olmo2", scaled, tmp_path)
    assert "post_feedforward_layernorm is behind a branch and undoes what its weights" in message


def test_mixers(tmp_path: Path) -> None:
    message = refused("mamba2", SKIPPED, tmp_path)
    assert "Mamba2ForCausalLM has no one list of 3 decoder layers" in message


def test_a_part_that_is_not_known() -> None:
    layer = nn.ModuleDict({"self_attn": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)})
    model = nn.Module()
    model.config = SimpleNamespace(num_hidden_layers=1)  # type: ignore[assignment]
    model.layers = nn.ModuleList([layer])
    assert layout_of(model).parallel  # no norm in front of the FFN
    layer["gain"] = nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match=r"layers: a ModuleDict has 'gain', which is not kn"):
        layout_of(model)


def test_layers_that_differ_already(tmp_path: Path) -> None:
    model = copy.deepcopy(model_of("llama"))
    model.config.per_layer_config = {0: {"skip": ["mlp"]}}
    with pytest.raises(UnsupportedError, match="layers differ by a per_layer_config already"):
        export_checkpoint(model, SKIPPED, tmp_path / "new")


def test_weights_that_are_not_plain(tmp_path: Path) -> None:
    model = model_of("llama", tie_word_embeddings=True)
    model.config.quantization_config = {"quant_method": "any"}
    with pytest.raises(UnsupportedError, match="weights are quantized: load it without quant"):
        export_checkpoint(model, SKIPPED, tmp_path / "new")
    with pytest.raises(TypeError, match="expected a transformers PreTrainedModel"):
        export_checkpoint(nn.Linear(2, 2), SKIPPED, tmp_path / "new")  # type: ignore[arg-type]


# Folders ---------------------------------------------------------------------------------------


def test_a_folder_that_is_not_new(tmp_path: Path) -> None:
    model = model_of("llama")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="is there already and not an empty folder; name a n"):
            export_checkpoint(model, SKIPPED, taken)
    with pytest.raises(ValueError, match="the folder above it does not exist; make it"):
        export_checkpoint(model, SKIPPED, tmp_path / "none" / "new")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_plan_of_another_model(tmp_path: Path) -> None:
    model = model_of("llama")
    short = SkipPlan.of(SKIPPED.sublayers[:4], [])
    with pytest.raises(UnsupportedError, match="layer 2 is no sublayer"):
        export_checkpoint(model, short, tmp_path / "new")
    assert torch.is_grad_enabled()
