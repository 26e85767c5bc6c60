"""Layers of transformers that are copied: the graph is that of a model traced in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from adaskip_fx.api import build
from adaskip_fx.capture.batch_sizes import BatchSizes
from adaskip_fx.capture.example_inputs import example_lengths
from adaskip_fx.capture.graph_key import GraphKey, Surroundings
from adaskip_fx.capture.phase_graph import CapturedPhase, capture_phase
from adaskip_fx.capture.reference import run_reference
from adaskip_fx.model.subclass import make_compiled_model
from adaskip_passes.tracing.repeated_layers.mark import Repeat
from tests.support.graph_text import inputs, lines

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": None,
}
_SIX = {"num_hidden_layers": 6}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

#: Model type, what else its configuration says, and how many of its layers are copied.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {}, 2),
    "sliding window": ("mistral", {"sliding_window": 64}, 2),
    "two kinds of attention": ("gemma2", {"head_dim": 8, "sliding_window": 64, **_SIX}, 2),
    "experts": ("mixtral", _EXPERTS, 2),
    "sinks": ("gpt_oss", {**_EXPERTS, "head_dim": 8, "sliding_window": 64, **_SIX}, 2),
    "fused projections": ("phi3", {}, 2),
    "learned positions": ("gpt2", {}, 2),
    "attention scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, 0),
}
#: Those whose layers give a tuple, which have no steps on a static cache.
TUPLES: dict[str, tuple[str, dict[str, Any], int]] = {
    "results besides": ("gptj", {"rotary_dim": 8}, 2),
    "nothing besides": ("mpt", {"max_seq_len": 2048}, 2),
    "biases by position": ("bloom", {}, 2),
    "one norm of several": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
}
KEYS = {
    "prefill": ("prefill", {}),
    "extend": ("extend", {"masked": True}),
    "decode": ("decode", {"one_token": True}),
    "static cache": ("decode", {"one_token": True, "static_tokens": 1}),
}


def model_of(kind: str, more: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_SIZES, **more})
    return AutoModelForCausalLM.from_config(config).eval()


def captured(model: Any, key: GraphKey) -> CapturedPhase:
    specs, lengths = run_reference(model).specs, example_lengths(key, 2048)
    return capture_phase(
        make_compiled_model(model), type(model).forward, key, specs, lengths, "eager"
    )


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


def check(family: str, phase: str) -> CapturedPhase:
    kind, more, copied = {**FAMILIES, **TUPLES}[family]
    model = model_of(kind, more)
    name, options = KEYS[phase]
    fixed: dict[str, Any] = {"batch": BatchSizes.only(1), "one_stored": False, "last_logits": True}
    fixed |= {"masked": False, "one_token": False, "dtype": torch.float32}
    fixed["surroundings"] = Surroundings.now(device := torch.device("cpu"))
    key = GraphKey(name, device=device, **{**fixed, **options})  # type: ignore[arg-type]
    got = captured(model, key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repeat, "of", lambda *_: None)
        full = captured(model, key)
    assert (got.capture.copied, full.capture.copied) == (copied, 0)
    assert lines(got.capture) == lines(full.capture)
    assert inputs(got.capture) == inputs(full.capture)
    assert got.sublayers == full.sublayers
    return got


@pytest.mark.parametrize("phase", ["prefill", slow("static cache")])
@pytest.mark.parametrize(
    "family",
    [name if name in ("llama", "learned positions") else slow(name) for name in FAMILIES],
)
def test_the_graph_of_a_family(family: str, phase: str) -> None:
    check(family, phase)


@pytest.mark.parametrize("phase", ["prefill", slow("decode")])
@pytest.mark.parametrize(
    "family", [name if name == "results besides" else slow(name) for name in TUPLES]
)
def test_the_graph_of_layers_that_give_a_tuple(family: str, phase: str) -> None:
    check(family, phase)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_the_other_phases(phase: str) -> None:
    check("two kinds of attention", phase)


def test_equal_layers_are_one_piece() -> None:
    got = check("llama", "prefill")
    keys = {p.meta["adaskip_piece"].key for p in got.outer.graph.find_nodes(op="call_module")}
    assert len(keys) == 4  # prologue, attention, FFN, epilogue


class Uneven(LlamaMLP):  # type: ignore[misc]
    """An FFN that does something else in every layer."""

    layer_idx: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * (1.0 + self.layer_idx))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_the_report_says_why_every_layer_was_traced() -> None:
    model = model_of("llama", {})
    assert "tracing" not in str(build(model, None, backend="eager").adaskip)
    for place, layer in enumerate(model.model.layers):
        layer.mlp.__class__, layer.mlp.layer_idx = Uneven, place
    uneven = build(model, None, backend="eager")
    assert "tracing   every layer, because Observed exception" in str(uneven.adaskip)
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(uneven(ids).logits, model(ids).logits, atol=1e-5)
