"""Attention that fused kernels have no place for, against transformers' own eager code."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaskip_fx.api import build
from adaskip_fx.capture.attention import attention
from adaskip_fx.capture.attention import mask as mask_for
from adaskip_fx.model.handle import runtime_of
from adaskip_passes.decode.ops import EVERY
from adaskip_passes.partition.outer import piece_of, sublayer_calls
from tests.support.eager_reference import assert_close, relative_error

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "sliding_window": 6,
}
FAMILIES = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"attn_logit_softcapping": 2.0}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {}),
}


def make(family: str, **changes: Any) -> Any:
    model, config, more = FAMILIES[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model(config(**{**SHAPE, **more, **changes})).eval()
    made.set_attn_implementation("eager")  # with SDPA transformers 5.17 leaves out the soft cap
    return made


def compare(model: Any, reference: Any, static_cache: bool, batch: int = 1) -> None:
    """A prompt longer than the window, single tokens, a chunk, single tokens."""
    compiled = build(model, None, backend="eager", static_cache=static_cache)
    cache, theirs = compiled.adaskip.new_cache(), DynamicCache()
    torch.manual_seed(1)
    with torch.no_grad():
        for step, count in enumerate((9, 1, 1, 4, 1, 1)):
            ids = torch.randint(0, 61, (batch, count))
            logits = compiled(ids, past_key_values=cache, logits_to_keep=1).logits
            expected = reference(ids, past_key_values=theirs).logits[:, -1:]
            assert_close(logits, expected, 1e-4, f"step {step}")


@pytest.mark.parametrize(
    "family", ["gemma2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma3", "mistral"))]
)
@pytest.mark.parametrize("static_cache", [pytest.param(False, marks=pytest.mark.slow), True])
def test_windows_and_soft_caps(family: str, static_cache: bool) -> None:
    compare(make(family), make(family), static_cache, batch=2 if static_cache else 1)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {"attn_logit_softcapping": 3.0}), ("mistral", {"sliding_window": 5})],
)
def test_another_cap_or_window_is_noticed(family: str, changes: dict[str, Any]) -> None:
    """The companion."""
    with pytest.raises(AssertionError, match="step 0"):
        compare(make(family), make(family, **changes), static_cache=False)


def eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """In float64, head by head."""
    out = torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).double()
    each = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            k, v = key[b, h // each].double(), value[b, h // each].double()
            scores = query[b, h].double() @ k.T * 0.3
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp() * seen[b]
            total = weights.sum(-1, keepdim=True)
            if sinks is not None:
                total = total + sinks[h].double().exp()
            out[b, :, h] = weights / total @ v
    return out


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("form", ["causal", "one", "bool", "filled", "last"])
def test_soft_caps_and_sinks_under_every_mask(
    softcap: float | None, with_sinks: bool, form: str
) -> None:
    torch.manual_seed(0)
    tokens, stored = {"causal": (7, 7), "one": (1, 7), "bool": (3, 7)}.get(form, (1, 7))
    tokens = 4 if form == "last" else tokens
    query = torch.randn(2, 4, tokens, 8)
    key, value = torch.randn(2, 2, stored, 8), torch.randn(2, 2, stored, 8)
    sinks = torch.randn(4) if with_sinks else None
    mask: torch.Tensor | None = None
    seen = torch.ones(2, tokens, stored)
    if form == "causal":
        seen = seen.tril()
    elif form == "bool":
        mask = torch.rand(2, 1, tokens, stored) > 0.4
        mask[..., 0] = True
        seen = mask[:, 0].double()
    elif form == "filled":
        mask = torch.tensor([[[[1, 0, EVERY, 5, 0]]], [[[0, 0, EVERY, 5, 0]]]])
        seen[..., 5:] = 0
        seen[0, :, 0] = 0
    elif form == "last":
        seen = seen.tril(stored - tokens)
    got, _ = attention(
        torch.nn.Module(), query, key, value, mask, scaling=0.3, softcap=softcap, s_aux=sinks
    )
    expected = eager(query, key, value, seen, softcap, sinks)
    assert relative_error(got.double(), expected) < 1e-5
    if with_sinks:  # the companion
        assert relative_error(got.double(), eager(query, key, value, seen, softcap, None)) > 1e-3


def test_a_token_that_sees_nothing_is_not_nan() -> None:
    """Padding: whatever comes out is read by nobody, but NaN would spread through the cache."""
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 3, 8)
    mask = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    got, _ = attention(torch.nn.Module(), query, key, key, mask, softcap=2.0)
    assert got.isfinite().all()


@pytest.mark.parametrize("window", [6, pytest.param(5, marks=pytest.mark.breaks)])
def test_a_mask_may_be_cut_to_the_last_queries(window: int) -> None:
    """Gemma 4 does so where only the last logits are asked for; another window is noticed."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 9, 8) for h in (4, 2, 2))
    sees_six = sliding_window_causal_mask_function(6)
    whole = mask_for(batch_size=1, q_length=9, mask_function=sees_six, local_size=window)
    assert whole is not None
    got, _ = attention(
        torch.nn.Module(), query[:, :, -2:], key, value, whole[:, :, -2:, :], scaling=0.3
    )
    seen = torch.ones(1, 9, 9).tril().triu(-5)[:, -2:]
    error = relative_error(got.double(), eager(query[:, :, -2:], key, value, seen, None, None))
    assert (error < 1e-5) == (window == 6)


def test_one_name_is_all_that_is_added_to_transformers() -> None:
    assert ALL_ATTENTION_FUNCTIONS["adaskip"] is attention
    assert "adaskip" not in ALL_ATTENTION_FUNCTIONS["sdpa"].__module__


def test_autocast_is_followed() -> None:
    """Captured under it: queries and keys are left in float32 by rotary embeddings."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        query, key, value = (torch.empty(1, h, n, 8) for h, n in ((4, 5), (2, 9), (2, 9)))
        got, _ = attention(torch.nn.Module(), query, key, value.bfloat16(), None)
    assert got.dtype == torch.bfloat16
    with FakeTensorMode():
        query, key, value = (torch.empty(1, h, n, 8) for h, n in ((4, 5), (2, 9), (2, 9)))
        got, _ = attention(torch.nn.Module(), query, key, value, None)
    assert got.dtype == torch.float32, "outside of it nothing is cast"


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_prompts_through_a_window_of_the_models_own(family: str) -> None:
    """No mask is made for it, nor for attention with a soft cap."""
    compiled = build(make(family), None, backend="eager")
    captures = runtime_of(compiled).graphs.states.current.captures.items()
    outer = next(group[0].outer for key, group in captures if key.phase == "prefill")
    nodes = [
        node
        for call in sublayer_calls(outer.graph).values()
        if (piece := piece_of(call)) is not None
        for node in piece.module.graph.find_nodes(
            op="call_function", target=torch.ops.adaskip.attend_windowed.default
        )
    ]
    every = [(None, 6), (None, EVERY)]
    seen = [node.args[3:5] for node in nodes]
    assert seen == ([(None, 6)] * 2 if family == "mistral" else every)
    assert [node.args[6:] for node in nodes] == (
        [(0.0, None)] * 2 if family == "mistral" else [(2.0, None)] * 2
    )
