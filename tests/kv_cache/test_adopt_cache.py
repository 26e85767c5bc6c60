"""A DynamicCache that a caller passes becomes the request's cache; other caches are refused."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from adaskip_fx.contrib.routing import Choice, Option
from adaskip_fx.kv_cache import adopt_cache
from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.model.handle import runtime_of
from tests.support.compiled_llamas import Entry, entry
from tests.support.eager_reference import assert_close
from tests.support.hybrids import hybrid

SHAPE = "grouped"
GREEDY = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture
def bank() -> Iterator[Entry]:
    one = entry(SHAPE)
    with one.using():
        yield one


def step(model: Any, cache: Any, ids: torch.Tensor, name: str = "past_key_values") -> torch.Tensor:
    """Logits of the last of some new tokens [batch, 1, vocabulary]."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, **{name: cache}).logits[:, -1:]
    return logits


EMPTY: dict[str, Callable[[Any], DynamicCache]] = {
    "without config": lambda config: DynamicCache(),
    "with config": lambda config: DynamicCache(config=config),
}


@pytest.mark.parametrize("kind", sorted(EMPTY))
@pytest.mark.parametrize("skip", [[], ["0.attention"]])
def test_the_object_that_was_passed_is_filled(bank: Entry, kind: str, skip: list[str]) -> None:
    """As transformers' models fill it: whoever holds it goes on with the whole text."""
    plan = bank.plan(skip)
    with bank.using(plan):
        held: Any = EMPTY[kind](bank.model.config)
        reference = bank.reference_cache()
        for n, seed in ((6, 0), (1, 1), (3, 2)):
            ids = bank.tokens(1, n, seed)
            expected = bank.oracle.step(ids, reference)[:, -1:]
            assert_close(step(bank.compiled, held, ids), expected, 1e-5)
            assert held.get_seq_length() == reference.get_seq_length()
        assert isinstance(held, SkipCache)
        assert held in bank.runtime.live_caches()
        twin = copy.deepcopy(held)
        ids = bank.tokens(1, 1, 3)
        expected = bank.oracle.step(ids, reference)[:, -1:]
        for cache in (held, twin):
            assert_close(step(bank.compiled, cache, ids), expected, 1e-5)


@pytest.mark.breaks
def test_an_object_that_stays_empty_shows(bank: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: what comes of it when ours only stands in for it."""
    monkeypatch.setattr(SkipCache, "become", lambda self, other: self)
    with pytest.raises(AssertionError):
        test_the_object_that_was_passed_is_filled(bank, "with config", [])


def test_it_is_what_comes_back(bank: Entry) -> None:
    held = DynamicCache()
    with torch.no_grad():
        output = bank.compiled(bank.tokens(1, 4), past_key_values=held)
    assert output.past_key_values is held
    given = DynamicCache()
    result = bank.compiled.generate(
        bank.tokens(1, 5), past_key_values=given, return_dict_in_generate=True, **GREEDY
    )
    assert result.past_key_values is given


def test_what_was_handed_in_comes_back_though_no_cache_is_used(bank: Entry) -> None:
    """As Llama does; where none was handed in there is none."""
    held, ids = DynamicCache(), bank.tokens(1, 4)
    with torch.no_grad():
        output = bank.compiled(ids, past_key_values=held, use_cache=False)
        assert bank.model(ids, past_key_values=DynamicCache(), use_cache=False).past_key_values
        assert bank.compiled(ids, use_cache=False).past_key_values is None
    assert output.past_key_values is held


def test_turns_of_a_chat_on_one_object(bank: Entry) -> None:
    """The documentation's loop: the text grows, the cache is the same object."""
    texts = []
    for model in (bank.compiled, bank.oracle.model):
        held, ids = DynamicCache(config=model.config), bank.tokens(1, 5)
        for turn in range(3):
            said = model.generate(ids, past_key_values=held, **GREEDY)
            ids = torch.cat([said, bank.tokens(1, 3, turn)], 1)
        texts.append(ids)
    assert torch.equal(*texts)


def test_its_buffers_go_back_when_it_is_gone(bank: Entry) -> None:
    gc.collect()
    before = bank.runtime.cache_bytes
    held = DynamicCache()
    step(bank.compiled, held, bank.tokens(1, 4))
    assert bank.runtime.cache_bytes > before
    del held
    gc.collect()
    assert bank.runtime.cache_bytes == before


@pytest.mark.parametrize("kind", sorted(EMPTY))
def test_a_filled_one_is_taken_in(bank: Entry, kind: str) -> None:
    """A prefix that the original has run; ours goes on with it, on buffers of its own."""
    held: Any = EMPTY[kind](bank.model.config)
    reference = bank.reference_cache()
    prompt = bank.tokens(2, 6)
    for cache in (held, reference):
        bank.oracle.step(prompt, cache)
    keys = held.layers[0].keys
    before = keys.clone()
    for n, seed in ((1, 1), (3, 2), (1, 3)):
        ids = bank.tokens(2, n, seed)
        expected = bank.oracle.step(ids, reference)[:, -1:]
        assert_close(step(bank.compiled, held, ids), expected, 1e-5)
    assert held.get_seq_length() == 11
    held.crop(-9)
    step(bank.compiled, held, bank.tokens(2, 4, 9))
    assert torch.equal(keys, before), "what was its own is not written to"


def test_a_filled_one_in_generate(bank: Entry) -> None:
    texts = []
    prompt = bank.tokens(1, 6)
    for model in (bank.compiled, bank.oracle.model):
        held = DynamicCache()
        bank.oracle.step(prompt, held)
        ids = torch.cat([prompt, bank.tokens(1, 2, 1)], 1)
        texts.append(model.generate(ids, past_key_values=held, **GREEDY))
    assert torch.equal(*texts)


@pytest.mark.breaks
def test_a_filled_one_that_is_not_taken_in_shows(
    bank: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The companion: its length is known, its values are not copied."""

    def only_length(ours: SkipCache, held: Any) -> None:
        ours.reserve(held.batch, held.tokens)
        ours.advance(held.tokens)

    monkeypatch.setattr(adopt_cache, "_fill", only_length)
    with pytest.raises(AssertionError, match="relative error"):
        test_a_filled_one_is_taken_in(bank, "with config")


@pytest.mark.slow
def test_states_are_taken_in() -> None:
    model, compiled = hybrid()
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    name = runtime_of(compiled).cache_argument
    for cache in caches:
        step(model, cache, torch.arange(1, 13).reshape(2, 6), name)
    token = torch.tensor([[4], [5]])
    mine, theirs = (step(m, c, token, name) for m, c in zip((compiled, model), caches, strict=True))
    assert_close(mine, theirs, 2e-5)


# Refusals ---------------------------------------------------------------------------------------


class Mine(DynamicCache):  # type: ignore[misc]
    """Somebody's own."""


def with_odd_layer(bank: Entry) -> DynamicCache:
    cache = DynamicCache(config=bank.model.config)
    cache.layers[1] = transformers.cache_utils.StaticLayer(max_cache_len=8)
    return cache


def filled(bank: Entry, rows: int = 1, cache: DynamicCache | None = None) -> DynamicCache:
    cache = cache or DynamicCache()
    bank.oracle.step(bank.tokens(rows, 6), cache)
    return cache


def forgetful(bank: Entry) -> DynamicCache:
    layers = [transformers.cache_utils.DynamicSlidingWindowLayer(4) for _ in range(2)]
    cache = DynamicCache()
    cache.layers = layers
    for index in range(2):
        cache.update(torch.ones(1, 2, 6, 8), torch.ones(1, 2, 6, 8), index)
    return cache


def uneven(bank: Entry) -> DynamicCache:
    cache = filled(bank)
    cache.layers[1].crop(-1)
    return cache


def narrow(bank: Entry) -> DynamicCache:
    cache = filled(bank)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.half(), layer.values.half()
    return cache


def deep(bank: Entry) -> DynamicCache:
    cache = filled(bank)
    cache.update(torch.ones(1, 2, 6, 8), torch.ones(1, 2, 6, 8), 2)
    return cache


def shallow(bank: Entry) -> DynamicCache:
    cache = filled(bank)
    del cache.layers[1]
    return cache


KINDS: dict[str, tuple[Callable[[Entry], Any], type[Exception], str]] = {
    "static": (
        lambda b: transformers.StaticCache(config=b.model.config, max_cache_len=9),
        TypeError,
        "past_key_values is a StaticCache; a compiled model needs its own cache, or a DynamicCach",
    ),
    "encoder and decoder": (
        lambda b: transformers.EncoderDecoderCache(DynamicCache(), DynamicCache()),
        TypeError,
        "past_key_values is a EncoderDecoderCache; a compiled model needs its own cache",
    ),
    "a subclass": (lambda b: Mine(), TypeError, "past_key_values is a Mine; a compiled model"),
    "a tuple": (lambda b: ((torch.ones(1),),), TypeError, "past_key_values is a tuple; a compiled"),
    "an odd layer": (
        with_odd_layer,
        TypeError,
        r"past_key_values has a StaticLayer \(layer 1\), which is not known here",
    ),
    "forgotten tokens": (
        forgetful,
        ValueError,
        "past_key_values has forgotten 3 tokens of layer 0, which are outside of its sliding win",
    ),
    "uneven": (
        uneven,
        ValueError,
        r"past_key_values does not tell how many tokens it is: it holds \[5, 6\] tokens, by layer",
    ),
    "another dtype": (
        narrow,
        ValueError,
        r"past_key_values holds float16 \[1, 2, 6, 8\] on cpu in layer 0, where the model stores f",
    ),
    "too many layers": (deep, ValueError, "past_key_values has 3 layers, the model 2"),
    "too few layers": (
        shallow,
        ValueError,
        "past_key_values holds nothing in layer 1, where the model stores float32",
    ),
    "other heads": (
        lambda b: filled(entry("equal_heads")),
        ValueError,
        r"past_key_values holds float32 \[1, 4, 6, 8\] on cpu in layer 0",
    ),
}


@pytest.mark.parametrize("case", sorted(KINDS))
def test_refusals(bank: Entry, case: str) -> None:
    """In words, and what was passed is as it was."""
    make, error, words = KINDS[case]
    cache = make(bank)
    before = type(cache), copy.deepcopy(getattr(cache, "__dict__", {})).keys()
    with torch.no_grad(), pytest.raises(error, match=f"^{words}"):
        bank.compiled(bank.tokens(1, 3), past_key_values=cache)
    assert (type(cache), getattr(cache, "__dict__", {}).keys()) == before
    with pytest.raises(error, match=f"^{words}"):
        bank.compiled.generate(bank.tokens(1, 9), past_key_values=cache, **GREEDY)


def test_an_offloaded_one(bank: Entry) -> None:
    cache = DynamicCache()
    cache.offloading = True  # (to make one takes a GPU)
    with torch.no_grad(), pytest.raises(TypeError, match="past_key_values is offloaded, but a com"):
        bank.compiled(bank.tokens(1, 3), past_key_values=cache)


def test_a_filled_one_where_the_plan_skips_attention(bank: Entry) -> None:
    words = "past_key_values is filled, but the plan stores nothing of layer 1, whose attention"
    with bank.using(bank.plan(["1.attention"])):
        cache = filled(bank)
        with torch.no_grad(), pytest.raises(ValueError, match=words):
            bank.compiled(bank.tokens(1, 3), past_key_values=cache)
    assert type(cache) is DynamicCache


def test_a_filled_one_where_the_prompt_chooses(bank: Entry) -> None:
    axes = [tuple(float(i == k) for i in range(32)) for k in range(2)]
    pairs = zip("ab", [bank.plan(), bank.plan(["1.ffn"])], axes, strict=True)
    choice = Choice(tuple(Option(name, plan, axis) for name, plan, axis in pairs))
    before = bank.runtime.plan
    bank.runtime.plan = choice
    try:
        words = "past_key_values is filled, but this compiled model chooses a plan by the first"
        with torch.no_grad(), pytest.raises(ValueError, match=words):
            bank.compiled(bank.tokens(1, 3), past_key_values=filled(bank))
    finally:
        bank.runtime.plan = before


def test_another_number_of_rows(bank: Entry) -> None:
    cache: Any = filled(bank, 2)
    words = "past_key_values holds a batch of 2, the new input has 1 rows"
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        bank.compiled(bank.tokens(1, 3), past_key_values=cache)
    assert cache.get_seq_length() == 6
    assert cache.batch_size == 2


def test_the_original_refuses_what_became_ours(bank: Entry) -> None:
    held: Any = DynamicCache()
    step(bank.compiled, held, bank.tokens(1, 4))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="this cache belongs to a comp"):
        bank.model(bank.tokens(1, 2), past_key_values=held)
    other = entry("equal_heads").compiled
    with torch.no_grad(), pytest.raises(ValueError, match="made by another compiled model"):
        other(bank.tokens(1, 2), past_key_values=held)
