"""Our cache beside transformers' `DynamicCache`: the same calls between the same steps."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from adaskip_fx.kv_cache.buffer_pool import BufferPool
from adaskip_fx.kv_cache.cache import REFUSED, SkipCache
from adaskip_fx.kv_cache.layer_spec import LayerCacheSpec, State
from adaskip_fx.kv_cache.saved import named_tensors
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.runtime.window import Window
from tests.support.compiled_llamas import SEEDS, Entry, entry, fewer, fixed
from tests.support.eager_reference import assert_close
from tests.support.hybrids import hybrid

SHAPE = "grouped"
PLANS: dict[str, list[str]] = {"nothing": [], "some": ["1.attention", "0.ffn"]}
Call = tuple[str, Any]


# Random calls -----------------------------------------------------------------------------------


@dataclass
class Pair:
    """One request on our cache and on transformers', for the same model.

    Attributes:
        mine, theirs: the caches.
        rows: of the batch, when a prompt begins.
        plan: what is skipped, by both.
    """

    bank: Entry
    plan: SkipPlan
    mine: SkipCache
    theirs: DynamicCache
    rows: int

    @classmethod
    def begun(cls, bank: Entry, plan: SkipPlan, rows: int = 2) -> Pair:
        return cls(bank, plan, bank.runtime.new_cache(), bank.reference_cache(), rows)

    def step(self, tokens: int, seed: int) -> None:
        """Run new tokens and compare their last logits, and all that is stored."""
        ids = self.bank.tokens(self.rows, tokens if self.length else max(2, tokens), seed)
        with torch.no_grad():
            logits = self.bank.compiled(ids, past_key_values=self.mine, logits_to_keep=1).logits
        assert_close(logits, self.bank.oracle.step(ids, self.theirs)[:, -1:], 1e-5, "logits")
        self.compare()

    def compare(self) -> None:
        """Whatever both are asked is answered alike."""
        mine, theirs = self.mine, self.theirs
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.get_query_offset() == theirs.get_query_offset()
        assert mine.get_mask_sizes(3, 1) == theirs.get_mask_sizes(3, 1)
        assert len(mine) == len(theirs) == len(mine.layers)
        assert mine.batch_size == (self.rows if self.length else -1)
        for i, (a, b) in enumerate(zip(mine.layers, theirs.layers, strict=True)):
            if f"{i}.attention" in map(str, self.plan.skipped("prefill")):
                assert a.keys is a.values is None
            elif self.length:
                assert_close(a.keys, b.keys, 1e-5, f"layer {i} keys")
                assert_close(a.values, b.values, 1e-5, f"layer {i} values")

    @property
    def length(self) -> int:
        return int(self.theirs.get_seq_length())

    def do(self, name: str, given: Any) -> Pair:
        """Call both; returns the pair to go on with."""
        if name == "copy":
            twin = copy.deepcopy(self.mine)
            return Pair(self.bank, self.plan, twin, copy.deepcopy(self.theirs), self.rows)
        if name == "reset":
            self.mine.reset()
            self.theirs = self.bank.reference_cache()
        elif name == "crop":  # at least two tokens stay, or none: one is a graph of its own
            forgotten = given if self.length - given >= 2 else self.length + 1
            self.mine.crop(-forgotten)
            if self.length:  # (transformers 5.17 cannot crop an empty one)
                self.theirs.crop(-forgotten)
        elif name == "repeat":
            times = given if self.rows == 1 and self.length else 1
            for cache in (self.mine, self.theirs):
                cache.batch_repeat_interleave(times)
            self.rows *= times
        else:  # rows that there are, in some order
            rows = torch.tensor([row % self.rows for row in given[: self.rows]])
            for cache in (self.mine, self.theirs):
                getattr(cache, name)(rows)
            self.rows = len(rows) if self.length else self.rows
        self.compare()
        return self


ROWS = st.lists(st.integers(0, 1), min_size=1, max_size=2)
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.sampled_from([1, 1, 2, 5])),
        st.tuples(st.just("crop"), st.sampled_from([0, 1, 2, 4, 30])),
        st.tuples(st.sampled_from(["reorder_cache", "batch_select_indices"]), ROWS),
        st.tuples(st.just("repeat"), st.sampled_from([1, 2])),
        st.tuples(st.sampled_from(["copy", "reset"]), st.none()),
    ),
    max_size=9,
)


def check_calls(bank: Entry, plan: SkipPlan, calls: list[Call], rows: int, seed: int) -> None:
    """Call both caches and step between; every copy's original goes on in the end."""
    with bank.using(plan):
        pair = Pair.begun(bank, plan, rows)
        pairs = [pair]
        pair.step(6, seed)
        for number, (name, given) in enumerate(calls):
            if name == "step":
                pair.step(given, seed + number)
            elif (after := pair.do(name, given)) is not pair:
                pairs.append(pair := after)
        for pair in pairs:
            pair.step(1, seed + 50)


@fewer(2)
@given(CALLS, st.sampled_from(sorted(PLANS)), st.integers(1, 2), SEEDS)
def test_random_calls(calls: list[Call], plan: str, rows: int, seed: int) -> None:
    bank = entry(SHAPE)
    check_calls(bank, bank.plan(PLANS[plan]), calls, rows, seed)


SOME: list[Call] = [
    ("crop", 2),
    ("step", 1),
    ("reorder_cache", [1, 0]),
    ("copy", None),
    ("step", 1),
    ("batch_select_indices", [1]),
    ("repeat", 2),
    ("crop", 0),
]


def test_calls_where_decode_steps_are_at_static_cache() -> None:
    bank = fixed(SHAPE)
    check_calls(bank, bank.plan(), SOME, 2, 0)
    assert bank.runtime.static_cache, "it stayed so"


def one_less(self: SkipCache, tokens: int) -> None:
    self.length = max(0, min(self.length, tokens + 1))


def no_rows(self: SkipCache, rows: torch.Tensor) -> None:
    pass


@pytest.mark.breaks
@pytest.mark.parametrize(("name", "wrong"), [("keep_first", one_less), ("keep_rows", no_rows)])
def test_a_wrong_one_shows(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    """The companion."""
    bank = entry(SHAPE)
    monkeypatch.setattr(SkipCache, name, wrong)
    with pytest.raises(AssertionError):
        check_calls(bank, bank.plan(), SOME, 2, 0)


# Every name -------------------------------------------------------------------------------------


@functools.cache
def attending() -> tuple[Any, Any]:
    bank = entry(SHAPE)
    return bank.oracle.model, bank.compiled


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {"attention": attending, "states": hybrid}


def filled(kind: str) -> tuple[SkipCache, DynamicCache]:
    """Ours and transformers', after the same prompt and a token."""
    model, compiled = MODELS[kind]()
    prompt, token = torch.arange(1, 13).reshape(2, 6), torch.tensor([[4], [5]])
    caches = compiled.adaskip.new_cache(), DynamicCache(config=model.config)
    name = runtime_of(compiled).cache_argument
    with torch.no_grad():
        for one, cache in zip((compiled, model), caches, strict=True):
            for ids in (prompt, token):
                one(input_ids=ids, **{name: cache})
    return caches


#: What is asked of both, by name; the answer is the same.
ASKED: dict[str, Callable[[Any], Any]] = {
    "get_max_cache_shape": lambda c: c.get_max_cache_shape(),
    "get_max_length": lambda c: (c.get_max_length(), c.get_max_length(0), c.get_max_length(99)),
    "get_mask_sizes": lambda c: (c.get_mask_sizes(3, 0), c.get_mask_sizes(3, 99)),
    "get_query_offset": lambda c: (c.get_query_offset(), c.get_query_offset(99)),
    "get_seq_length": lambda c: (c.get_seq_length(), c.get_seq_length(99)),
    "has_previous_state": lambda c: (c.has_previous_state(), c.has_previous_state(0)),
    "is_compileable": lambda c: c.is_compileable,
    "is_croppable": lambda c: c.is_croppable,
    "is_dummy": lambda c: c.is_dummy,
    "is_initialized": lambda c: c.is_initialized,
    "is_linear": lambda c: c.is_linear,
    "is_recording_past": lambda c: c.is_recording_past(0),
    "is_sliding": lambda c: c.is_sliding,
    "max_cache_len": lambda c: c.max_cache_len,
    "offloading": lambda c: c.offloading,
}
#: What is asked in another test of this file, or answers better than theirs does.
ELSEWHERE = frozenset(
    {
        *("activate_past_recording", "batch_repeat_interleave", "batch_select_indices", "crop"),
        *("reorder_cache", "reset", "layers", "get_conv_state", "get_recurrent_state"),
        *("batch_size", "max_batch_size"),  # theirs is -1, always
        "layer_class_to_replicate",  # says how theirs makes layers
    }
)


def outcome(call: Callable[[Any], Any], cache: Any) -> Any:
    try:
        return call(cache)
    except ValueError as error:
        return type(error)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_what_both_are_asked(kind: str) -> None:
    mine, theirs = filled(kind)
    names = public_names()
    for name in names & set(ASKED):
        assert outcome(ASKED[name], mine) == outcome(ASKED[name], theirs), name
    assert mine.batch_size == 2
    assert mine, "it is true"


def public_names() -> set[str]:
    return {name for name in dir(DynamicCache()) if not name.startswith("_")}


def unknown(names: set[str]) -> set[str]:
    return names - set(ASKED) - ELSEWHERE - set(REFUSED)


def test_every_name_is_answered_or_refused() -> None:
    assert not unknown(public_names())
    assert unknown({*public_names(), "new_in_another_version"}) == {"new_in_another_version"}
    assert not hasattr(SkipCache, "get_max_cache_shape") or "get_max_cache_shape" in public_names()


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_layers_are_of_the_kinds_that_transformers_looks_for(kind: str) -> None:
    """Keys, values and states are those of transformers' layers, by index."""
    mine, theirs = filled(kind)
    pairs = list(zip(mine.layers, theirs.layers, strict=True))
    assert [a.is_croppable for a, _ in pairs].count(True) == (2 if kind == "attention" else 1)
    for i, (a, b) in enumerate(pairs):
        for base in (CacheLayerMixin, LinearAttentionCacheLayerMixin):
            assert isinstance(a, base) == isinstance(b, base)
        if isinstance(b, CacheLayerMixin):
            assert a.get_seq_length() == b.get_seq_length() == 7
            assert a.get_mask_sizes(2) == b.get_mask_sizes(2)
            assert a.get_max_length() == b.get_max_length()
            assert (a.dtype, a.device, a.is_initialized) == (torch.float32, mine.device, True)
            assert_close(a.keys, b.keys, 1e-5, f"layer {i} keys")
            assert_close(a.values, b.values, 1e-5, f"layer {i} values")
        else:
            assert a.has_previous_state == b.has_previous_state
            assert a.conv_kernel_size == b.conv_kernel_size
            assert_close(a.conv_states[0], b.conv_states[0], 1e-5, f"layer {i} convolution")
            assert_close(a.recurrent_states[0], b.recurrent_states[0], 1e-5, f"layer {i} state")
            for name in {"get_conv_state", "get_recurrent_state"} & public_names():
                assert_close(getattr(mine, name)(i), getattr(theirs, name)(i), 1e-5, name)
    mine.reset()
    assert not mine.is_initialized
    assert mine.batch_size == -1
    assert all(not layer.get_seq_length() for layer in mine.layers)


class Nobody:
    """An owner of a cache that no model fills."""

    def __init__(self) -> None:
        self.buffer_pool, self.model = BufferPool(keep=False), None

    def track(self, cache: SkipCache) -> None:
        pass


def test_a_layer_of_both_kinds_and_one_of_none() -> None:
    """Which few models have, and cost much to capture."""
    states = (State("conv", 0, (6, 4), torch.float32), State("recurrent", 0, (3,), torch.float32))
    specs = [LayerCacheSpec(2, 8, 2, 4, states), LayerCacheSpec()]
    cache = SkipCache(Nobody(), specs, specs, torch.float32, torch.device("cpu"))
    both = cache.layers[0]
    assert both.keys is both.conv_states[0] is both.recurrent_states[0] is None
    cache.reserve(3, 5)
    cache.advance(5)
    both, none = cache.layers
    assert isinstance(both, CacheLayerMixin)
    assert isinstance(both, LinearAttentionCacheLayerMixin)
    assert not isinstance(none, CacheLayerMixin | LinearAttentionCacheLayerMixin)
    shapes = [both.keys.shape, both.values.shape, both.conv_states[0].shape]
    assert shapes == [(3, 2, 5, 8), (3, 2, 5, 4), (3, 6, 4)]
    assert both.recurrent_states[0].shape == (3, 3)
    assert both.conv_kernel_size == {0: 4}
    assert both.has_previous_state == both.is_conv_states_initialized == {0: True}
    assert none.keys is none.values is None
    assert cache.is_linear == [False, False]
    assert cache.is_sliding == [False, False]
    assert cache.get_seq_length(1) == 5
    assert "MixerAndAttentionPart(0, 5 tokens)" in repr(cache.layers)


def test_rows_of_states() -> None:
    """They follow as keys do: the next step is that of transformers' cache."""
    mine, theirs = filled("states")
    model, compiled = hybrid()
    rows = torch.tensor([1, 0])
    logits = []
    for one, cache in ((compiled, mine), (model, theirs)):
        cache.reorder_cache(rows)
        with torch.no_grad():
            name = runtime_of(compiled).cache_argument
            logits.append(one(input_ids=torch.tensor([[3], [7]]), **{name: cache}).logits)
    assert_close(logits[0], logits[1], 2e-5)


def test_iteration_is_what_another_cache_can_be_made_of() -> None:
    mine, theirs = filled("attention")
    made = DynamicCache(mine)
    assert made.get_seq_length() == 7
    for a, b, c in zip(made, theirs, mine, strict=True):
        assert_close(a[0], b[0], 1e-5)
        assert torch.equal(a[0], c[0])
        assert c[2] is None


# What is shown ----------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["crop", "reset", "reorder", "end"])
def test_what_was_shown_stays_as_it_was(then: str) -> None:
    """Someone who holds a layer's keys sees nothing of what comes after."""
    bank = entry(SHAPE)
    with bank.using():
        bank.runtime.buffer_pool.keep = True
        try:
            pair = Pair.begun(bank, bank.plan())
            pair.step(6, 0)
            held = pair.mine.layers[1].keys
            before = held.clone()
            if then == "crop":
                pair.do("crop", 3)
            elif then == "reset":
                pair.do("reset", None)
            elif then == "reorder":
                pair.do("reorder_cache", [1, 0])
            else:
                pair = Pair.begun(bank, bank.plan())
            pair.step(6, 1)
            assert torch.equal(held, before)
        finally:
            bank.runtime.buffer_pool.keep = False
            bank.runtime.free()


def test_without_that_it_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    monkeypatch.setattr(SkipCache, "_unshare", lambda self, tokens: None)
    with pytest.raises(AssertionError):
        test_what_was_shown_stays_as_it_was("crop")


def test_the_past_is_recorded_anyway() -> None:
    """What transformers' assisted generation asks of a cache before it takes tokens back."""
    for cache in filled("attention"):
        cache.activate_past_recording()
        cache.crop(-3)
        cache.crop(0)
        assert cache.get_seq_length() == 4


def test_an_edit_in_place_counts() -> None:
    bank = entry(SHAPE)
    with bank.using():
        pair = Pair.begun(bank, bank.plan())
        pair.step(6, 0)
        for cache in (pair.mine, pair.theirs):
            cache.layers[0].values.mul_(2.0)
        pair.step(1, 1)


# Requests ---------------------------------------------------------------------------------------


def test_what_was_read_of_rows_follows_them() -> None:
    bank = entry(SHAPE)
    with bank.using(), torch.no_grad():
        cache = bank.runtime.new_cache(stop_tokens=torch.tensor([7]))
        bank.compiled(bank.tokens(2, 5), past_key_values=cache)
        probed = tuple(s for s in bank.sublayers if s.kind == "ffn")
        cache.request.decoding = True
        cache.request.decode.window = Window(probed, size=100)
        bank.compiled(torch.tensor([[3], [7]]), past_key_values=cache)
        twin = copy.deepcopy(cache)
        before = cache.request.window.statistics
        cache.reorder_cache(torch.tensor([1, 1]))
    request = cache.request
    assert request.finished.tolist() == [True, True]
    assert torch.equal(request.window.statistics, before[:, [1, 1]])
    assert request.window.steps == 1
    assert twin.request.finished.tolist() == [False, True], "a copy keeps its own"


# Refusals ---------------------------------------------------------------------------------------

TENSOR = torch.zeros(1)
REFUSALS: dict[str, tuple[str, Callable[[SkipCache], Any], type[Exception], str]] = {
    "another model's attention": (
        "attention",
        lambda c: c.update(TENSOR, TENSOR, 0),
        NotImplementedError,
        "this cache belongs to a compiled model, which stores only what its plan runs",
    ),
    "another model's mixer": (
        "states",
        lambda c: c.update_conv_state(TENSOR, 0),
        NotImplementedError,
        "this cache belongs to a compiled model",
    ),
    "offloading": (
        "attention",
        lambda c: c.offload(0),
        NotImplementedError,
        "this cache cannot be offloaded",
    ),
    "prefetching": (
        "attention",
        lambda c: c.prefetch(0),
        NotImplementedError,
        "this cache cannot be offloaded",
    ),
    "initialization": (
        "attention",
        lambda c: c.early_initialization(1, 2, 8, torch.float32, torch.device("cpu")),
        NotImplementedError,
        "this cache cannot be initialized by hand",
    ),
    "a shallow copy": (
        "attention",
        copy.copy,
        TypeError,
        "this cache cannot be copied without its buffers, which belong to one request; use copy.d",
    ),
    "a pickle of states": (
        "states",
        pickle.dumps,
        TypeError,
        r"this cache cannot be pickled, since mixers keep states; save\(path\) it, and load it",
    ),
    "a state's token": (
        "states",
        lambda c: c.crop(-1),
        NotImplementedError,
        "this cache cannot be cropped: a recurrent mixer's state cannot forget a token",
    ),
    "a state's past": (
        "states",
        lambda c: c.activate_past_recording(),
        NotImplementedError,
        "this cache cannot record the past",
    ),
    "iteration over states": (
        "states",
        list,
        NotImplementedError,
        "this cache is not keys and values of all layers",
    ),
    "no rows": (
        "attention",
        lambda c: c.batch_select_indices(torch.tensor([], dtype=torch.int64)),
        ValueError,
        r"rows of this cache are chosen by a list of at least one, got \[0\]",
    ),
    "one row, not a list": (
        "attention",
        lambda c: c.batch_select_indices(torch.tensor(1)),
        ValueError,
        r"rows of this cache are chosen by a list of at least one, got \[\]",
    ),
    "a row that is not there": (
        "attention",
        lambda c: c.reorder_cache(torch.tensor([0, 2])),
        IndexError,
        "out of range",
    ),
    "a layer's own update": (
        "attention",
        lambda c: c.layers[0].update(TENSOR, TENSOR),
        NotImplementedError,
        "a layer of a compiled model's cache cannot be changed alone",
    ),
    "a layer's own crop": (
        "states",
        lambda c: c.layers[0].crop(-1),
        NotImplementedError,
        "a layer of a compiled model's cache cannot be changed alone",
    ),
    "another tensor in a layer": (
        "attention",
        lambda c: setattr(c.layers[0], "keys", TENSOR),
        NotImplementedError,
        "a layer of a compiled model's cache has no keys to be replaced: edit the tensors in pl",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSALS))
def test_refusals(case: str) -> None:
    """In words, and the cache is as it was."""
    kind, call, error, words = REFUSALS[case]
    cache, _ = filled(kind)
    before = {name: tensor.clone() for name, tensor in named_tensors(cache).items()}
    with pytest.raises(error, match=words):
        call(cache)
    after = named_tensors(cache)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_iteration_over_a_part() -> None:
    bank = entry(SHAPE)
    plan = bank.plan(PLANS["some"])
    with bank.using(plan):
        pair = Pair.begun(bank, plan)
        pair.step(4, 0)
        with pytest.raises(NotImplementedError, match="the plan skips attention, or mixers"):
            iter(pair.mine)


@pytest.mark.parametrize("number", [1, 3, 9])
def test_a_positive_crop_is_what_the_installed_version_makes_of_it(number: int) -> None:
    """Refused in the same words, or the number of tokens to keep, as older versions have it."""
    results = []
    for cache in filled("attention"):
        try:
            cache.crop(number)
            results.append(str(cache.get_seq_length()))
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    """The bank's models with nothing skipped, unless a test says so."""
    with entry(SHAPE).using():
        yield
