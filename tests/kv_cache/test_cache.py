"""The cache: storage for the attention that runs, growth, copies, forgetting, and modes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Cache

from adaskip_fx.api import build
from adaskip_fx.capture import config_reads
from adaskip_fx.kv_cache.buffers import CacheBuffers
from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import Action, SkipPlan
from adaskip_passes.tracing import dynamo
from tests.support.compiled_llamas import (
    SEEDS,
    Entry,
    assert_same_cache,
    check_request,
    entry,
    fewer,
    make_model,
    stored,
)
from tests.support.eager_reference import assert_close

SHAPE = "grouped"


def fill(bank: Entry, cache: Any, *steps: torch.Tensor) -> torch.Tensor:
    """Logits of the last step [batch, 1, vocabulary]."""
    with torch.no_grad():
        for ids in steps:
            output = bank.compiled(ids, past_key_values=cache, logits_to_keep=1)
    logits: torch.Tensor = output.logits
    return logits


def oracle(bank: Entry, *steps: torch.Tensor) -> torch.Tensor:
    reference = bank.reference_cache()
    for ids in steps:
        logits = bank.oracle.step(ids, reference)
    return logits[:, -1:]


# Bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "kept"),
    [([], 3), (["1.attention"], 2), (["0.attention", "2.attention", "1.ffn"], 1)],
)
def test_bytes_are_those_of_the_attention_that_runs(skip: list[str], kept: int) -> None:
    bank = entry("three_layers")
    config = bank.model.config
    with bank.using(bank.plan(skip)):
        cache = bank.runtime.new_cache()
        assert cache.nbytes == 0
        fill(bank, cache, bank.tokens(1, 9))
        token = 2 * config.num_key_value_heads * config.head_dim * 4  # K and V, float32
        assert cache.nbytes == kept * token * cache.capacity
        assert [s is not None for s in stored(cache)].count(True) == kept
        assert f"{kept} of 3 layers stored" in repr(cache)


def test_skipping_all_attention_stores_nothing() -> None:
    bank = entry("three_layers")
    plan = bank.plan([f"{n}.attention" for n in range(3)])
    with bank.using(plan):
        cache = check_request(bank, plan, (9, 1, 4, 1))
    assert cache.nbytes == 0
    assert cache.get_seq_length() == len(bank.tokens(1, 15)[0])


def test_live_bytes_are_counted_until_a_request_ends() -> None:
    bank = entry(SHAPE)
    gc.collect()
    before = bank.runtime.cache_bytes
    with bank.using():
        caches = [bank.runtime.new_cache() for _ in range(2)]
        for cache in caches:
            fill(bank, cache, bank.tokens(1, 5))
        twin = copy.deepcopy(caches[0])
    assert bank.runtime.cache_bytes - before == 3 * caches[0].nbytes
    assert len(bank.runtime.live_caches()) >= 3
    del cache, caches, twin
    gc.collect()
    assert bank.runtime.cache_bytes == before


@pytest.fixture
def _leaves_cycles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Exceptions that a model's code catches leave cycles: those of its config, traced as it is."""
    monkeypatch.setattr(config_reads, "traced_once", nullcontext)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def first_request() -> list[SkipCache]:
    """What is left of the request that a new compiled model captures its graphs in."""
    compiled = build(make_model("grouped"), None, backend="eager")
    with torch.no_grad():
        cache = compiled(torch.ones(1, 5, dtype=torch.int64)).past_key_values
        compiled(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)
    assert runtime_of(compiled).live_caches() == [cache]
    del cache
    left: list[SkipCache] = runtime_of(compiled).live_caches()
    return left


@pytest.mark.slow
@pytest.mark.usefixtures("_leaves_cycles")
def test_tracing_leaves_nothing_of_a_request() -> None:
    assert not first_request()
    assert not gc.isenabled()  # as it was


@pytest.mark.slow
@pytest.mark.usefixtures("_leaves_cycles")
def test_without_sweeping_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: what Dynamo leaves are cycles, which hold the frames of whoever called."""
    without = partial(torch._dynamo.config.patch, run_gc_after_compile=False)
    monkeypatch.setattr(dynamo, "_swept", without)
    assert first_request()


def test_two_requests_never_share_storage() -> None:
    bank = entry(SHAPE)
    with bank.using():
        caches = [bank.runtime.new_cache() for _ in range(2)]
        for cache in caches:
            fill(bank, cache, bank.tokens(1, 5))
    pointers = [{t.data_ptr() for kv in stored(c) for t in kv or ()} for c in caches]
    assert len(pointers[0]) == 4
    assert not pointers[0] & pointers[1]


# Growth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(255, 1, 1, 1), (2, 254, 1, 1), (250, 300, 1), (511, 1, 1)])
def test_growth_keeps_what_is_stored(steps: tuple[int, ...]) -> None:
    bank = entry(SHAPE)
    plan = bank.plan(["1.attention"], factors={"1.attention": 1.5})
    with bank.using(plan):
        cache = check_request(bank, plan, steps)
    assert cache.capacity > cache.length


def test_growth_token_by_token() -> None:
    bank = entry("one_layer")
    with bank.using():
        cache = check_request(bank, bank.plan(), (3,) + (1,) * 300, keep=1)
    assert cache.capacity == 512


@pytest.mark.parametrize("prompt", [255, 256, 300, 512])
def test_the_token_after_a_prompt_moves_nothing(prompt: int) -> None:
    bank = entry("one_layer")
    with bank.using():
        cache = bank.runtime.new_cache()
        fill(bank, cache, bank.tokens(1, prompt))
        before = cache.lease.buffers
        fill(bank, cache, bank.tokens(1, 1))
        assert cache.lease.buffers is before


@pytest.mark.parametrize("expected", [0, 300, 100_000])
def test_never_twice_as_much_as_is_filled_and_a_block(expected: int) -> None:
    bank = entry("one_layer")
    with bank.using():
        cache = bank.runtime.new_cache()
        cache.expected = expected
        for tokens in (3, 250, 1, 200, 1, 1, 120):
            fill(bank, cache, bank.tokens(1, tokens))
            assert cache.length <= cache.capacity <= 2 * cache.length + 256


@pytest.mark.breaks
def test_lost_growth_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: new storage without the old content."""
    monkeypatch.setattr(CacheBuffers, "take", lambda self, old, tokens: None)
    bank = entry(SHAPE)
    with bank.using(), pytest.raises(AssertionError, match=r"layer 0|logits"):
        check_request(bank, bank.plan(), (250, 3, 5, 1))


def test_a_capacity_is_made_at_once() -> None:
    bank = entry(SHAPE)
    with bank.using():
        cache = bank.runtime.new_cache(capacity=500)
        fill(bank, cache, bank.tokens(1, 4))
        held = cache.nbytes
        fill(bank, cache, bank.tokens(1, 490), bank.tokens(1, 1))
    assert cache.capacity == 512
    assert cache.nbytes == held


def test_generate_sizes_the_cache_from_its_limits() -> None:
    bank = entry(SHAPE)
    with bank.using():
        result = bank.compiled.generate(
            bank.tokens(1, 4), max_new_tokens=400, max_time=0.0, return_dict_in_generate=True
        )
    cache = result.past_key_values
    assert cache.expected == 403
    assert cache.capacity <= 2 * cache.length + 256


# Copies and forgetting --------------------------------------------------------------------------


def test_a_copy_is_a_request_of_its_own() -> None:
    """Prefix caching: one prompt, two continuations."""
    bank = entry(SHAPE)
    prompt, ways = bank.tokens(1, 9), [[bank.tokens(1, n, k) for n in (3, 1, 1)] for k in (1, 2)]
    plan = bank.plan(["1.attention"], ["0.ffn"], {"0.ffn": 0.5})
    with bank.using(plan):
        first = bank.runtime.new_cache()
        fill(bank, first, prompt)
        second = copy.deepcopy(first)
        before = [t.clone() for kv in stored(second) for t in kv or ()]
        mine = [fill(bank, first, *ways[0])]
        after = [t for kv in stored(second) for t in kv or ()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        mine.append(fill(bank, second, *ways[1]))
        for logits, way in zip(mine, ways, strict=True):
            assert_close(logits, oracle(bank, prompt, *way), 1e-5)
        assert second.stored == first.stored == (True, False)


@pytest.mark.breaks
def test_a_copy_that_shares_storage_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    bank = entry(SHAPE)
    prompt, one, two = bank.tokens(1, 9), bank.tokens(1, 3, 1), bank.tokens(1, 3, 2)
    token = bank.tokens(1, 1, 3)
    monkeypatch.setattr(SkipCache, "__deepcopy__", lambda self, memo: _alias(self))
    with bank.using():
        first = bank.runtime.new_cache()
        fill(bank, first, prompt)
        second = copy.deepcopy(first)
        fill(bank, first, one)
        fill(bank, second, two)
        with pytest.raises(AssertionError, match="relative error"):
            assert_close(fill(bank, first, token), oracle(bank, prompt, one, token), 1e-5)


def _alias(cache: SkipCache) -> SkipCache:
    twin = SkipCache(cache.owner, cache.specs, cache.kept, cache.dtype, cache.device)
    twin.__dict__.update(cache.__dict__)
    twin.request = cache.request.copy()
    return twin


@fewer(2)
@given(st.integers(1, 13), st.integers(1, 6), st.booleans(), SEEDS)
def test_crop_forgets_the_last_tokens(keep: int, more: int, ours: bool, seed: int) -> None:
    bank = entry(SHAPE)
    ids, extra = bank.tokens(1, 13, seed), bank.tokens(1, more, seed + 1)
    with bank.using(bank.plan(["0.attention"], factors={"0.attention": 1.25})):
        cache = bank.runtime.new_cache()
        fill(bank, cache, ids[:, :12], ids[:, 12:])
        if ours:
            cache.keep_first(keep)
        else:
            cache.crop(keep - 13)
        assert cache.get_seq_length() == keep
        logits = fill(bank, cache, extra)
        assert_close(logits, oracle(bank, ids[:, :keep], extra), 1e-5)


def test_crop_to_nothing_begins_a_new_prompt() -> None:
    bank = entry(SHAPE)
    with bank.using():
        cache = bank.runtime.new_cache()
        fill(bank, cache, bank.tokens(1, 7), bank.tokens(1, 1))
        for forget in (
            lambda: cache.crop(-4),
            lambda: cache.crop(-100),
            lambda: cache.keep_first(0),
        ):
            cache.keep_first(1000)
            cache.crop(0)
            assert cache.get_seq_length() in (4, 8), "all is kept"
            cache.keep_first(4)
            forget()
            assert cache.get_seq_length() == 0
            ids = bank.tokens(1, 4, 3)
            assert_close(fill(bank, cache, ids), oracle(bank, ids), 1e-5)


def test_reset_makes_room_for_another_batch() -> None:
    bank = entry(SHAPE)
    with bank.using():
        cache = bank.runtime.new_cache()
        fill(bank, cache, bank.tokens(1, 7), bank.tokens(1, 1))
        cache.reset()
        assert len(cache) == 2
        assert cache.get_seq_length() == 0
        ids = bank.tokens(2, 4, 3)
        assert_close(fill(bank, cache, ids), oracle(bank, ids), 1e-5)
        token = bank.tokens(2, 1, 4)
        assert_close(fill(bank, cache, token), oracle(bank, ids, token), 1e-5)


# Modes ------------------------------------------------------------------------------------------


@fewer(3)
@given(st.lists(st.sampled_from(["inference", "no_grad"]), min_size=4, max_size=8))
def test_inference_mode_and_no_grad_mixed_on_one_cache(modes: list[str]) -> None:
    bank = entry(SHAPE)
    steps = [bank.tokens(1, n, n) for n in (1, 3, 1, 252, 1, 2, 1, 1)[: len(modes)]]
    with bank.using(bank.plan(["1.ffn"], factors={"1.ffn": 0.5})):
        cache = bank.runtime.new_cache()
        for ids, mode in zip(steps, modes, strict=True):
            with torch.inference_mode() if mode == "inference" else torch.no_grad():
                logits = bank.compiled(ids, past_key_values=cache, logits_to_keep=1).logits
        assert_close(logits.clone(), oracle(bank, *steps), 1e-5)


def test_graphs_captured_in_inference_mode_serve_outside_of_it() -> None:
    model = make_model("tied")
    ids, token = torch.arange(1, 7).unsqueeze(0), torch.tensor([[3]])
    with torch.inference_mode():
        compiled = build(model, None, backend="eager")
        cache = compiled.adaskip.new_cache()
        compiled(ids, past_key_values=cache, logits_to_keep=1)
        compiled(token, past_key_values=cache, logits_to_keep=1)
    with torch.no_grad():
        logits = compiled(token, past_key_values=cache, logits_to_keep=1).logits
        assert_close(logits, model(torch.cat([ids, token, token], 1)).logits[:, -1:], 1e-5)


def test_grad_mode_is_fine_when_no_parameter_wants_gradients() -> None:
    bank = entry(SHAPE)
    ids, token = bank.tokens(1, 6), bank.tokens(1, 1, 1)
    for parameter in bank.model.parameters():
        parameter.requires_grad_(False)
    try:
        with bank.using():
            cache = bank.runtime.new_cache()
            with torch.inference_mode():
                bank.compiled(ids, past_key_values=cache, logits_to_keep=1)
            logits = bank.compiled(token, past_key_values=cache, logits_to_keep=1).logits
            assert not logits.requires_grad
            assert_close(logits, oracle(bank, ids, token), 1e-5)
    finally:
        for parameter in bank.model.parameters():
            parameter.requires_grad_(True)


def test_autocast() -> None:
    """A region in bfloat16 has graphs of its own; storage stays as wide as the model."""
    bank = entry("equal_heads")
    steps = [bank.tokens(1, n, n) for n in (6, 1, 3, 1)]
    with bank.using(bank.plan(["0.ffn"], factors={"0.ffn": 0.75})):
        plain = fill(bank, bank.runtime.new_cache(), *steps)
        with torch.autocast("cpu", torch.bfloat16):
            cache = bank.runtime.new_cache()
            narrow = fill(bank, cache, *steps)
            expected = oracle(bank, *steps)
        assert narrow.dtype == torch.bfloat16
        assert_close(narrow, expected, 2e-2)
        assert_close(fill(bank, bank.runtime.new_cache(), *steps), plain, 0.0)
        assert cache.dtype == torch.float32
        difference = (narrow.float() - plain).abs().max() / plain.abs().max()
        assert 1e-4 < float(difference) < 0.1, "autocast did something"


# Actions and bookkeeping ------------------------------------------------------------------------


def test_kv_only_in_prefill_is_used_by_decode() -> None:
    """Its K/V are of the stream as it was: those the oracle's attention writes."""
    bank = entry(SHAPE)
    plan = SkipPlan(bank.sublayers, {bank.sublayers[2]: Action.KV_ONLY}, {})
    with bank.using(plan):
        cache, reference = bank.runtime.new_cache(), bank.reference_cache()
        for ids in (bank.tokens(1, 8), bank.tokens(1, 1), bank.tokens(1, 1, 1)):
            assert_close(fill(bank, cache, ids), bank.oracle.step(ids, reference)[:, -1:], 1e-5)
            assert_same_cache(bank, plan, cache, reference)


def test_what_transformers_asks() -> None:
    bank = entry(SHAPE)
    with bank.using(bank.plan(["0.attention"])):
        cache = bank.runtime.new_cache()
        assert isinstance(cache, Cache)
        assert cache, "an empty cache is true"
        fill(bank, cache, bank.tokens(1, 5), bank.tokens(1, 1))
    assert [cache.get_seq_length(layer) for layer in (0, 1)] == [6, 6]
    assert cache.get_query_offset() == 6
    assert cache.get_mask_sizes(3, 0) == (9, 0)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable


def test_a_failed_step_changes_nothing() -> None:
    """An impossible token: the length stays, and the next prompt's K/V are right."""
    bank = entry(SHAPE)
    ids, token = bank.tokens(1, 5), bank.tokens(1, 1, 1)
    impossible = torch.full((1, 1), 10**6)
    with bank.using():
        cache = bank.runtime.new_cache()
        with pytest.raises(IndexError), torch.no_grad():
            bank.compiled(impossible, past_key_values=cache, logits_to_keep=1)
        assert cache.get_seq_length() == 0
        reference = bank.reference_cache()
        fill(bank, cache, ids)
        bank.oracle.step(ids, reference)
        assert_same_cache(bank, bank.plan(), cache, reference)
        with pytest.raises(IndexError), torch.no_grad():
            bank.compiled(impossible, past_key_values=cache, logits_to_keep=1)
        assert_close(fill(bank, cache, token), bank.oracle.step(token, reference), 1e-5)
        assert_same_cache(bank, bank.plan(), cache, reference)
