"""`torch.compile(model, backend="adaskip")` on the user's own StaticCache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from adaskip_fx import AdaSkip, Profile, SkipPlan
from adaskip_fx import backend as module
from adaskip_fx.compensation import Compensation
from adaskip_fx.decisions import Schedule, Stages
from adaskip_fx.fingerprint import fingerprint
from adaskip_fx.plan import Action, Sublayer
from adaskip_fx.policies import LLMDrop
from adaskip_fx.sublayer import Kind
from tests.oracle import Oracle

LAYERS = 3
KINDS: tuple[Kind, ...] = ("attention", "ffn")
SUBLAYERS = tuple(Sublayer(n, kind) for n in range(LAYERS) for kind in KINDS)
PLANS = [[], ["0.attention", "1.ffn"], ["0.attention", "1.attention", "2.attention"], ["2.ffn"]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plan_of(skip: list[str], factor: float = 1.1) -> SkipPlan:
    factors = {Sublayer.parse(name): factor for name in skip}
    return SkipPlan.of(SUBLAYERS, skip, compensation=Compensation.scale(factors))


def compiled(model: LlamaForCausalLM, **options: Any) -> Any:
    options = {"inner_backend": "eager", **options}
    return torch.compile(model, backend="adaskip", fullgraph=True, options=options)


def static_cache(model: LlamaForCausalLM) -> StaticCache:
    """Initialised before it is captured, as a compiled prefill needs it."""
    cache = StaticCache(config=model.config, max_cache_len=48)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64), past_key_values=cache)
    cache.reset()
    return cache


def skipping(model: LlamaForCausalLM, skip: list[str], factor: float, ids: torch.Tensor) -> Any:
    """The oracle: the decoder written out, without a cache; logits of the last token."""
    inner = model.model
    x = inner.embed_tokens(ids)
    rotary = inner.rotary_emb(x, position_ids=torch.arange(ids.shape[1])[None])
    for n, layer in enumerate(inner.layers):
        if f"{n}.attention" in skip:
            x = factor * x
        else:
            mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)[None, None]
            h = layer.input_layernorm(x)
            x = x + layer.self_attn(h, position_embeddings=rotary, attention_mask=mask)[0]
        if f"{n}.ffn" not in skip:
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        else:
            x = factor * x
    return model.lm_head(inner.norm(x))[:, -1:]


def request(
    model: LlamaForCausalLM, fast: Any, cache: StaticCache, skip: list[str], factor: float = 1.1
) -> float:
    """The largest difference to the oracle over a prefill and five decoded tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (1, 14), generator=generator)
    worst = 0.0
    with torch.no_grad():
        for at in (9, 10, 11, 12, 13, 14):
            new = ids[:, :9] if at == 9 else ids[:, at - 1 : at]
            logits = fast(new, past_key_values=cache).logits[:, -1:]
            expected = skipping(model, skip, factor, ids[:, :at])
            worst = max(worst, (logits - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("skip", PLANS, ids=str)
def test_a_request_equals_the_oracle(model: LlamaForCausalLM, skip: list[str]) -> None:
    """Logits of every step; skipped attention writes no K/V, and its length is counted."""
    cache = static_cache(model)
    assert request(model, compiled(model, plan=plan_of(skip)), cache, skip) < 1e-5
    for n, layer in enumerate(cache.layers):
        assert int(layer.cumulative_length) == 14
        written = bool(layer.keys.any()) or bool(layer.values.any())
        assert written == (f"{n}.attention" not in skip)


def test_the_fused_graph_equals_the_oracle(model: LlamaForCausalLM) -> None:
    fast = compiled(model, plan=plan_of(PLANS[1]), link="fused")
    assert request(model, fast, static_cache(model), PLANS[1]) < 1e-5


def test_a_wrong_factor_is_seen(model: LlamaForCausalLM) -> None:
    fast = compiled(model, plan=plan_of(["1.ffn"], factor=1.2))
    assert request(model, fast, static_cache(model), ["1.ffn"], factor=1.1) > 1e-3


def test_two_requests_after_each_other(model: LlamaForCausalLM) -> None:
    fast, cache = compiled(model, plan=plan_of(["0.attention"])), static_cache(model)
    for _ in range(2):
        cache.reset()
        assert request(model, fast, cache, ["0.attention"]) < 1e-5


def profile_of(model: LlamaForCausalLM, cosines: dict[str, float]) -> Profile:
    moments = np.ones((1, len(SUBLAYERS), 5))
    moments[0, :, 0] = [cosines.get(str(s), 0.1) for s in SUBLAYERS]
    moments[0, :, 1] = 1.1
    return Profile(SUBLAYERS, moments, fingerprint(model), {}, {})


def test_the_decode_window_adds_ffn_sublayers(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Threshold -1 by a profile in which everything is unlike: all FFN that run are added."""
    cosines = {str(s): -0.9 for s in SUBLAYERS} | {"0.attention": -0.8}
    profile_of(model, cosines).save(tmp_path / "p")
    options = {
        "profile": str(tmp_path / "p"),
        "alpha": 1.2,
        "policy": AdaSkip(window=2),
    }
    fast = compiled(model, **options)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (1, 14), generator=generator)
    ffn = ["0.ffn", "1.ffn", "2.ffn"]
    cache = static_cache(model)
    with torch.no_grad():
        fast(ids[:, :9], past_key_values=cache)
        for at in (10, 11):  # the window
            fast(ids[:, at - 1 : at], past_key_values=cache)
        (state,) = (m for _, m in module._models.values())
        assert [str(s) for s in state.decode_plan.skipped("decode")] == ["0.attention", *ffn]
        fast(ids[:, 11:12], past_key_values=cache)
        assert state.probed() == ()
        cache.reset()
        fast(ids[:, :9], past_key_values=cache)  # a new request: the window is open again
        assert state.decode_plan is state.plan
        assert [str(s) for s in state.probed()] == ffn


def schedule() -> Schedule:
    empty = SkipPlan.empty(SUBLAYERS)
    late = {Sublayer(1, "attention"): Action.KV_ONLY, Sublayer(2, "ffn"): Action.SKIP}
    return Schedule(((0, empty), (2, SkipPlan(SUBLAYERS, {}, late))))


@pytest.mark.parametrize("after", [2, 1, 9])
def test_a_schedule_equals_the_oracle(model: LlamaForCausalLM, after: int) -> None:
    """Two requests of two tokens in full, then two with less; other switches are other logits."""
    fast, cache = compiled(model, plan=schedule()), static_cache(model)
    oracle = Oracle(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (1, 9), generator=generator)
    worst = 0.0
    for _ in range(2):
        cache.reset()
        reference = DynamicCache(config=model.config)
        for decoded in range(-1, 4):
            new = ids[:, :5] if decoded < 0 else ids[:, 5 + decoded : 6 + decoded]
            less = {"1.attention": "kv_only", "2.ffn": "skip"} if decoded >= after else {}
            oracle.behave({}, less)
            with torch.no_grad():
                logits = fast(new, past_key_values=cache).logits[:, -1:]
            expected = oracle.step(new, reference)[:, -1:]
            worst = max(worst, (logits - expected).abs().max().item())
    assert (worst < 1e-5) == (after == 2)


def test_decisions_that_need_a_request_are_refused(model: LlamaForCausalLM) -> None:
    plan = SkipPlan.empty(SUBLAYERS)
    for decision, what in (
        (Stages((("a", plan),)), "a plan per stage"),
        (replace(plan, last_token_full=True), "a plan with last_token_full"),
    ):
        text = backend_error(compiled(model, plan=decision), static_cache(model))
        assert f"cannot run {what}: it sees a prompt as one graph and no request" in text


def test_a_policy_that_learns_nothing(model: LlamaForCausalLM) -> None:
    measured = profile_of(model, {"1.ffn": 0.9})
    fast = compiled(model, profile=measured, alpha=1.2, policy=LLMDrop("joint"))
    assert request(model, fast, static_cache(model), ["1.ffn"], factor=1.0) < 1e-5


def test_the_entry_point_is_declared() -> None:
    (declared,) = entry_points(group="torch_dynamo_backends", name="adaskip")
    assert declared.load() is module.adaskip


def backend_error(fast: Any, cache: StaticCache) -> str:
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        fast(torch.zeros(1, 4, dtype=torch.int64), past_key_values=cache)
    return str(caught.value)


def test_bad_options_say_what_is_wrong(model: LlamaForCausalLM) -> None:
    cache = static_cache(model)
    assert "has no option alhpa; it has profile, alpha" in backend_error(
        compiled(model, alhpa=1.2), cache
    )
    assert 'needs options={"profile": path, "alpha": 1.2}' in backend_error(compiled(model), cache)


def test_gradients_are_refused(model: LlamaForCausalLM) -> None:
    fast, cache = compiled(model, plan=plan_of([])), static_cache(model)
    with pytest.raises(BackendCompilerFailed, match=r"call the model under torch\.no_grad\(\)"):
        fast(torch.zeros(1, 4, dtype=torch.int64), past_key_values=cache)


def test_a_plan_of_another_model_is_refused(model: LlamaForCausalLM) -> None:
    other = SkipPlan.empty(SUBLAYERS[:4])
    message = backend_error(compiled(model, plan=other), static_cache(model))
    assert "the graph has 6 sublayers, the profile or plan 4" in message
