"""`torch.compile(model, backend="adaskip")` on the user's own StaticCache."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from adaskip_fx.backend import requests
from adaskip_fx.backend.requests import BackendRequest, Requests
from adaskip_fx.contrib.routing import Choice, Option
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.skip_plan import Action, Sublayer
from adaskip_fx.plans.sublayer import Kind
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies import LLMDrop
from adaskip_fx.profiles.fingerprint import fingerprint
from tests.support.eager_reference import Oracle

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
    module.reset()  # Dynamo does it for backends that it has called


def plan_of(skip: list[str], factor: float = 1.1) -> SkipPlan:
    factors = {Sublayer.parse(name): factor for name in skip}
    return SkipPlan.of(SUBLAYERS, skip, surrogates=Surrogates.scale(factors))


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


@pytest.mark.parametrize(
    "skip",
    [plan if plan == PLANS[1] else pytest.param(plan, marks=pytest.mark.slow) for plan in PLANS],
    ids=str,
)
def test_a_request_equals_the_oracle(model: LlamaForCausalLM, skip: list[str]) -> None:
    """Logits of every step; skipped attention writes no K/V, and its length is counted."""
    cache = static_cache(model)
    assert request(model, compiled(model, plan=plan_of(skip)), cache, skip) < 1e-5
    for n, layer in enumerate(cache.layers):
        assert int(layer.cumulative_length) == 14
        written = bool(layer.keys.any()) or bool(layer.values.any())
        assert written == (f"{n}.attention" not in skip)


@pytest.mark.slow
def test_the_fused_graph_equals_the_oracle(model: LlamaForCausalLM) -> None:
    fast = compiled(model, plan=plan_of(PLANS[1]), link="fused")
    assert request(model, fast, static_cache(model), PLANS[1]) < 1e-5


@pytest.mark.slow
def test_a_wrong_factor_is_seen(model: LlamaForCausalLM) -> None:
    fast = compiled(model, plan=plan_of(["1.ffn"], factor=1.2))
    assert request(model, fast, static_cache(model), ["1.ffn"], factor=1.1) > 1e-3


@pytest.mark.slow
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
    cache, other = static_cache(model), static_cache(model)
    with torch.no_grad():
        fast(ids[:, :9], past_key_values=cache)
        for at in (10, 11):  # the window
            fast(ids[:, at - 1 : at], past_key_values=cache)
            if at == 10:  # another request has a window of its own
                fast(ids[:, :5], past_key_values=other)
                fast(ids[:, 5:6], past_key_values=other)
        state, second = state_of(cache), state_of(other)
        assert [str(s) for s in state.decode.plan.skipped("decode")] == ["0.attention", *ffn]
        assert second.decode.window is not None
        assert second.decode.window.steps == 1
        assert second.decode.plan is second.plan
        fast(ids[:, 11:12], past_key_values=cache)
        assert state_of(cache) is state
        assert state.decode.probed == ()
        cache.reset()
        fast(ids[:, :9], past_key_values=cache)  # a new request: the window is open again
        state = state_of(cache)
        assert state.decode.plan is state.plan
        assert [str(s) for s in state.decode.probed] == ffn


def requests_of() -> Requests:
    """Those of the one model that was compiled."""
    ((found,),) = (known.values() for known in module._models.values())
    return found


def state_of(cache: StaticCache) -> BackendRequest:
    return requests_of().known[cache.layers[0].cumulative_length][0]


def schedule() -> Schedule:
    empty = SkipPlan.empty(SUBLAYERS)
    late = {Sublayer(1, "attention"): Action.KV_ONLY, Sublayer(2, "ffn"): Action.SKIP}
    return Schedule(((0, empty), (2, SkipPlan(SUBLAYERS, {}, late))))


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 9))])
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


# Requests ----------------------------------------------------------------------------------------

PROMPTS_SKIP = {"0.ffn": "skip"}
STEPS: tuple[tuple[int, dict[str, str]], ...] = (
    (0, {}),
    (2, {"1.attention": "kv_only", "2.ffn": "skip"}),
    (4, {"1.ffn": "skip"}),
)


def stepped() -> Schedule:
    """Prompts leave out an FFN; from the third and from the fifth token something else is."""

    def actions(named: dict[str, str]) -> dict[Sublayer, Action]:
        return {Sublayer.parse(name): Action(action) for name, action in named.items()}

    skipped = actions(PROMPTS_SKIP)
    return Schedule(tuple((at, SkipPlan(SUBLAYERS, skipped, actions(do))) for at, do in STEPS))


@dataclass
class Served:
    """A text on a cache of the user's, beside the oracle's."""

    cache: StaticCache
    reference: DynamicCache
    decoded: int = 0


class Server:
    """Does what people do to a compiled model and its caches; the oracle does the same.

    Attributes:
        worst: the largest difference of logits so far.
    """

    def __init__(self, model: LlamaForCausalLM, fast: Any, caches: int, seed: int) -> None:
        self.model, self.fast, self.oracle = model, fast, Oracle(model)
        self.chance = random.Random(seed)
        self.texts = [self._fresh(static_cache(model)) for _ in range(caches)]
        self.worst = 0.0

    def _fresh(self, cache: StaticCache) -> Served:
        return Served(cache, DynamicCache(config=self.model.config))

    def event(self) -> None:
        place = self.chance.randrange(len(self.texts))
        text = self.texts[place]
        full = int(text.cache.layers[0].cumulative_length) > 38
        if text.reference.get_seq_length() == 0 or full or self.chance.random() < 0.15:
            if self.chance.random() < 0.5:
                text.cache.reset()
                text = self._fresh(text.cache)
            else:
                text = self._fresh(static_cache(self.model))
            self.texts[place] = text
            self.prompt(text, self.chance.choice([1, 1, 2, 5]), self.chance.random() < 0.4)
        elif self.chance.random() < 0.1:
            self.prompt(text, self.chance.choice([2, 5]), self.chance.random() < 0.4)
        else:
            self.decode(text)

    def prompt(self, text: Served, tokens: int, elsewhere: bool) -> None:
        """On an empty cache or a filled one; `elsewhere`: by the model itself, in full."""
        text.decoded = 0
        runs = self.model if elsewhere else self.fast
        self.oracle.behave({} if elsewhere else PROMPTS_SKIP)
        self._compare(runs, text, tokens)

    def decode(self, text: Served) -> None:
        self.oracle.behave({}, dict(STEPS[sum(text.decoded >= at for at, _ in STEPS) - 1][1]))
        self._compare(self.fast, text, 1)
        text.decoded += 1

    def _compare(self, runs: Any, text: Served, tokens: int) -> None:
        ids = torch.tensor([[self.chance.randrange(128) for _ in range(tokens)]])
        logits = runs(ids, past_key_values=text.cache).logits[:, -1]
        expected = self.oracle.step(ids, text.reference)[:, -1]
        self.worst = max(self.worst, (logits - expected).abs().max().item())


def test_requests_are_told_apart_by_their_caches(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several in turn, caches reset or new, prompts of one token, of several, or run elsewhere.

    Every step against the oracle. Where caches can be made under inference_mode, they count no
    writes. The companion does not look at marks, so that a reset cache goes on.
    """
    fast = compiled(model, plan=stepped())
    for seed, mode in ((0, torch.no_grad), (2, torch.inference_mode)):
        with mode():
            server = Server(model, fast, caches=3, seed=seed)
            for _ in range(60):
                server.event()
                assert server.worst < 1e-5
    monkeypatch.setattr(requests, "_mark", lambda tensor: 0)
    with torch.no_grad():
        server = Server(model, fast, caches=3, seed=0)
        for _ in range(60):
            server.event()
    assert server.worst > 1e-2


@pytest.mark.slow
def test_a_prompt_of_one_token_is_a_prompt(model: LlamaForCausalLM) -> None:
    """The smallest: twice the same one on a cache; by its length it would be decoding."""
    fast, oracle = compiled(model, plan=stepped()), Oracle(model)
    one, cache = torch.tensor([[7]]), static_cache(model)
    with torch.no_grad():
        for _ in range(2):
            cache.reset()
            logits = fast(one, past_key_values=cache).logits
            reference = DynamicCache(config=model.config)
            expected = oracle.behave(PROMPTS_SKIP).step(one, reference)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
            plain = oracle.behave({}).step(one, DynamicCache(config=model.config))
            assert (logits - plain).abs().max() > 1e-2
        # without a cache every call is a prompt
        logits = fast(one, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_cache_that_is_made_anew_in_every_step_is_refused(model: LlamaForCausalLM) -> None:
    fast = compiled(model, plan=stepped())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        fast(torch.tensor([[5, 6, 7]]), past_key_values=cache)
        with pytest.raises(BackendCompilerFailed, match="made anew in every step") as caught:
            fast(torch.tensor([[8]]), past_key_values=cache)
    assert "tells requests apart by their cache, and this one is made anew" in str(caught.value)
    assert "use a StaticCache, or adaskip_fx.compile" in str(caught.value)
    torch._dynamo.reset()
    # the companion: under a plan that does the same in every step, requests need not be told apart
    fast, oracle = compiled(model, plan=plan_of(["1.ffn"])), Oracle(model)
    oracle.behave({"1.ffn": "skip"}, factors={"1.ffn": 1.1})
    cache, reference = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for tokens in ([5, 6, 7], [8], [9]):
            ids = torch.tensor([tokens])
            logits = fast(ids, past_key_values=cache).logits
            torch.testing.assert_close(logits, oracle.step(ids, reference), rtol=0, atol=1e-5)


def test_equal_options_share_and_others_do_not(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """A `Profile`, a copy of it and the path it was saved to are the same option."""
    first = next(model.parameters())
    profile = profile_of(model, {"1.ffn": 0.9})
    profile.save(tmp_path / "p")

    def found(**options: Any) -> Requests:
        return module._requests_of(options, [torch.zeros(1), first])

    shared = found(profile=profile, alpha=1.5)
    assert found(profile=copy.deepcopy(profile), alpha=1.5) is shared
    assert found(alpha=1.5, profile=str(tmp_path / "p")) is shared
    assert found(profile=profile, alpha=1.5, policy=AdaSkip(window=3)) is not shared
    assert found(profile=profile_of(model, {"1.ffn": 0.8}), alpha=1.5) is not shared
    assert found(profile=profile, alpha=1.6) is not shared
    assert len(module._models) == 1
    assert len(module._models[first]) == 4


class Unhashable(LLMDrop):
    __hash__ = None  # type: ignore[assignment]


def test_an_option_that_cannot_be_hashed_equals_itself(model: LlamaForCausalLM) -> None:
    first, profile = next(model.parameters()), profile_of(model, {"1.ffn": 0.9})
    policies = [Unhashable("joint"), Unhashable("joint")]
    one, other = (module._requests_of({"profile": profile, "policy": p}, [first]) for p in policies)
    assert one is not other
    assert module._requests_of({"profile": profile, "policy": policies[0]}, [first]) is one


def test_nothing_is_kept_of_what_is_gone(model: LlamaForCausalLM) -> None:
    """Requests go with their caches, and all of it with the model."""
    fast = compiled(model, plan=stepped())
    with torch.no_grad():
        caches = [static_cache(model) for _ in range(3)]
        for cache in caches:
            fast(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    known = requests_of().known
    assert len(known) == 3 * 3  # counter, keys and values of the first layer
    caches[1:] = []
    del cache
    gc.collect()
    assert len(known) == 3
    parameter = torch.nn.Parameter(torch.zeros(1))
    module._requests_of({"plan": stepped()}, [parameter])
    assert len(module._models) == 2
    del parameter
    gc.collect()
    assert len(module._models) == 1


@pytest.mark.slow
def test_decisions_that_need_a_request_are_refused(model: LlamaForCausalLM) -> None:
    plan = SkipPlan.empty(SUBLAYERS)
    for decision, what in (
        (Choice((Option("a", plan, (1.0,)),)), "a choice"),
        (replace(plan, last_token_full=True), "a plan with last_token_full"),
    ):
        text = backend_error(compiled(model, plan=decision), static_cache(model))
        assert f"cannot run {what}: it sees a prompt as one graph and no request" in text
    windows = Windows.of([s for s in SUBLAYERS if s.kind == "attention"], Window(4))
    text = backend_error(compiled(model, plan=plan.with_windows(windows)), static_cache(model))
    assert "cannot run a plan with windows yet" in text


@pytest.mark.slow
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
