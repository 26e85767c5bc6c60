"""`generate` and hand-written loops: the same tokens as the oracle's own `generate`."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import StoppingCriteriaList

from adaskip_fx.api import build
from adaskip_fx.policies import AdaSkip
from adaskip_fx.testing import plans
from tests.support.compiled_llamas import SEEDS, Entry, entry, fewer, make_model, profile_of
from tests.support.eager_reference import assert_close
from tests.support.generation import Collected, LastTokenIn, mixed_plan, padded

SHAPE = "grouped"


def both(bank: Entry, ids: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """What the compiled model generates and what the oracle does, from the same seed."""
    results = []
    for model in (bank.compiled, bank.oracle.model):
        torch.manual_seed(options.get("seed", 0))
        given = {k: v for k, v in options.items() if k != "seed"}
        results.append(model.generate(ids, **{"do_sample": False, "max_new_tokens": 8, **given}))
    return results[0], results[1]


def assert_generates_the_same(bank: Entry, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    mine, expected = both(bank, ids, **options)
    assert torch.equal(mine, expected)
    tokens: torch.Tensor = mine
    return tokens


@fewer(2)
@given(st.data(), st.integers(2, 20), st.integers(1, 12), SEEDS)
def test_greedy_generation(data: st.DataObject, prompt: int, new: int, seed: int) -> None:
    bank = entry(SHAPE)
    with bank.using(data.draw(plans(bank.sublayers))):
        mine, expected = both(
            bank,
            bank.tokens(1, prompt, seed),
            max_new_tokens=new,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(mine.sequences, expected.sequences)
    assert len(mine.logits) == new
    for step, (logits, wanted) in enumerate(zip(mine.logits, expected.logits, strict=True)):
        assert_close(logits, wanted, bank.tolerance, f"step {step}")


def test_another_plan_generates_something_else() -> None:
    """The companion: a sublayer more or less is seen in the tokens."""
    bank = entry(SHAPE)
    ids = bank.tokens(1, 9)
    with bank.using(mixed_plan(bank)):
        bank.oracle.decode = {**bank.oracle.decode, "0.ffn": "skip"}
        mine, expected = both(bank, ids, max_new_tokens=30)
    assert torch.equal(mine[:, :10], expected[:, :10])  # the prompt's program is the same
    assert not torch.equal(mine, expected)


@given(SEEDS, SEEDS)
def test_sampling_with_a_seed(seed: int, prompt: int) -> None:
    bank = entry(SHAPE)
    options = {"do_sample": True, "temperature": 2.0, "top_k": 20, "max_new_tokens": 6}
    ids = bank.tokens(1, 5, prompt)
    with bank.using(mixed_plan(bank)):
        first = assert_generates_the_same(bank, ids, seed=seed, **options)
        torch.manual_seed(seed)
        again = bank.compiled.generate(ids, **options)
    assert torch.equal(first, again)


def test_another_seed_samples_something_else() -> None:
    bank = entry(SHAPE)
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 20}
    with bank.using(mixed_plan(bank)):
        samples = {
            tuple(both(bank, bank.tokens(1, 5), seed=seed, **options)[0][0].tolist())
            for seed in range(5)
        }
    assert len(samples) == 5


def test_several_samples_of_one_prompt() -> None:
    bank = entry(SHAPE)
    with bank.using(mixed_plan(bank)):
        tokens = assert_generates_the_same(
            bank, bank.tokens(1, 5), do_sample=True, num_return_sequences=2, temperature=2.0
        )
    assert tokens.shape[0] == 2


# Requests after and beside each other -----------------------------------------------------------


def test_short_then_long_then_short() -> None:
    """Lengths of one request leave nothing behind for the next; storage grows past 256 tokens."""
    bank = entry(SHAPE)
    with bank.using(mixed_plan(bank)):
        for prompt, new in ((3, 2), (250, 20), (3, 2), (2, 300), (40, 3)):
            assert_generates_the_same(bank, bank.tokens(1, prompt, prompt), max_new_tokens=new)


def test_the_same_request_twice() -> None:
    bank = entry(SHAPE)
    ids = bank.tokens(1, 12)
    with bank.using(mixed_plan(bank)):
        first = bank.compiled.generate(ids, max_new_tokens=9, do_sample=False)
        bank.compiled.generate(bank.tokens(1, 5, 7), max_new_tokens=3, do_sample=False)
        assert torch.equal(bank.compiled.generate(ids, max_new_tokens=9, do_sample=False), first)


@fewer(3)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=24), SEEDS)
def test_requests_interleaved_token_by_token(order: list[int], seed: int) -> None:
    """Three live requests, stepped in any order: each as if it were alone."""
    bank = entry(SHAPE)
    with bank.using(mixed_plan(bank)), torch.no_grad():
        live = [Loop(bank, bank.tokens(1, 4 + n, seed + n)) for n in range(3)]
        for number in order:
            live[number].step()
        for number, loop in enumerate(live):
            if count := order.count(number):
                expected = bank.oracle.model.generate(
                    loop.prompt, max_new_tokens=count, do_sample=False
                )
                assert torch.equal(loop.tokens, expected)


class Loop:
    """Greedy decoding by hand, one token for each `step`."""

    def __init__(self, bank: Entry, prompt: torch.Tensor) -> None:
        self.compiled = bank.compiled
        self.prompt = self.tokens = prompt
        self.cache: Any = None

    def step(self) -> None:
        new = self.tokens if self.cache is None else self.tokens[:, -1:]
        output = self.compiled(new, past_key_values=self.cache, logits_to_keep=1)
        self.cache = output.past_key_values
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        self.tokens = torch.cat([self.tokens, token], 1)


def test_a_request_of_another_runtime_state_would_be_seen() -> None:
    """The companion: two requests on one cache are not each alone."""
    bank = entry(SHAPE)
    with bank.using(mixed_plan(bank)), torch.no_grad():
        one, two = (Loop(bank, bank.tokens(1, 5, n)) for n in (1, 2))
        one.step()
        two.step()
        two.cache = one.cache
        for _ in range(12):
            one.step()
            two.step()
        expected = bank.oracle.model.generate(one.prompt, max_new_tokens=13, do_sample=False)
    assert not torch.equal(one.tokens, expected)


def test_returned_logits_are_the_callers_own() -> None:
    bank = entry(SHAPE)
    with bank.using(), torch.no_grad():
        cache = bank.runtime.new_cache()
        kept = []
        for step, count in enumerate((5, 1, 1, 1, 3, 1)):
            ids = bank.tokens(1, count, step)
            logits = bank.compiled(ids, past_key_values=cache, logits_to_keep=1).logits
            kept.append((logits, logits.clone()))
        for logits, copy in kept:
            assert torch.equal(logits, copy)
            logits.zero_()  # and nothing in the model reads them again
        token = bank.tokens(1, 1, 9)
        reference = bank.reference_cache()
        for step, count in enumerate((5, 1, 1, 1, 3, 1)):
            bank.oracle.step(bank.tokens(1, count, step), reference)
        logits = bank.compiled(token, past_key_values=cache, logits_to_keep=1).logits
        assert_close(logits, bank.oracle.step(token, reference), bank.tolerance)


# What generate can do ---------------------------------------------------------------------------


def test_streaming() -> None:
    bank = entry(SHAPE)
    streamer = Collected()
    with bank.using(mixed_plan(bank)):
        expected = bank.oracle.model.generate(bank.tokens(1, 6), max_new_tokens=7, do_sample=False)
        bank.compiled.generate(
            bank.tokens(1, 6), max_new_tokens=7, do_sample=False, streamer=streamer
        )
    assert streamer.tokens == expected[0].tolist()
    assert streamer.ended


def test_in_another_thread() -> None:
    """As a server streams; the thread traces the graphs as well."""
    model = make_model("tied")
    compiled = build(model, None, backend="eager")
    ids, streamer, done = torch.arange(1, 8).unsqueeze(0), Collected(), []
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    thread = threading.Thread(
        target=lambda: done.append(compiled.generate(ids, streamer=streamer, **options))
    )
    thread.start()
    thread.join()
    expected = model.generate(ids, **options)
    assert torch.equal(done[0], expected)
    assert streamer.tokens == expected[0].tolist()


def test_classifier_free_guidance() -> None:
    """A logits processor that runs the model on a second sequence of its own."""
    bank = entry(SHAPE)
    with bank.using():
        plain = assert_generates_the_same(bank, bank.tokens(1, 6), max_new_tokens=12)
        ids = bank.tokens(1, 6)
        guided = assert_generates_the_same(bank, ids, max_new_tokens=12, guidance_scale=2.0)
    assert not torch.equal(guided, plain)


def test_stopping() -> None:
    """At an end-of-sequence token, and by a criterion of the caller's."""
    bank = entry(SHAPE)
    ids = bank.tokens(1, 6)
    with bank.using(mixed_plan(bank)):
        whole = assert_generates_the_same(bank, ids, max_new_tokens=20)[0, 6:].tolist()
        stop = whole[4]
        length = 6 + whole.index(stop) + 1
        assert length < 26
        criteria = StoppingCriteriaList([LastTokenIn({stop})])
        for options in ({"eos_token_id": stop}, {"stopping_criteria": criteria}):
            tokens = assert_generates_the_same(bank, ids, max_new_tokens=20, **options)
            assert tokens.shape[1] == length


def test_several_turns_on_one_cache() -> None:
    bank = entry(SHAPE)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    turns = {}
    with bank.using(mixed_plan(bank)):
        for model in (bank.compiled, bank.oracle.model):
            said, cache, lengths = bank.tokens(1, 5), None, []
            for turn in range(3):
                result = model.generate(said, past_key_values=cache, **options)
                cache = result.past_key_values
                lengths.append(cache.get_seq_length())
                said = torch.cat([result.sequences, bank.tokens(1, 3, turn + 1)], 1)
            turns[model] = said, lengths
    mine, expected = turns.values()
    assert torch.equal(mine[0], expected[0])
    assert mine[1] == expected[1] == [8, 15, 22]


def test_a_returned_cache_stays_valid_while_others_run() -> None:
    bank = entry(SHAPE)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with bank.using(mixed_plan(bank)):
        mine, expected = both(bank, bank.tokens(1, 5), **options)
        bank.compiled.generate(bank.tokens(1, 50, 3), max_new_tokens=9, do_sample=False)
        said = torch.cat([mine.sequences, bank.tokens(1, 3, 1)], 1)
        again = bank.compiled.generate(said, past_key_values=mine.past_key_values, **options)
        wanted = bank.oracle.model.generate(
            said, past_key_values=expected.past_key_values, **options
        )
    assert torch.equal(again.sequences, wanted.sequences)


@pytest.mark.parametrize("chunk", [2, 3, 5, 16, 17, 100])
def test_chunked_prefill(chunk: int) -> None:
    bank = entry(SHAPE)
    plan = bank.plan(["0.attention", "1.ffn"], factors={"1.ffn": 0.9})
    with bank.using(plan):
        whole = bank.oracle.model.generate(bank.tokens(1, 17), max_new_tokens=6, do_sample=False)
        chunked = bank.compiled.generate(
            bank.tokens(1, 17), max_new_tokens=6, do_sample=False, prefill_chunk_size=chunk
        )
    assert torch.equal(chunked, whole)


def test_without_a_cache() -> None:
    """Every step is a prompt then; nothing is decoded."""
    bank = entry(SHAPE)
    with bank.using(bank.plan(["0.attention"], factors={"0.attention": 0.7})):
        assert_generates_the_same(bank, bank.tokens(1, 6), use_cache=False)
        with torch.no_grad():
            output = bank.compiled(bank.tokens(1, 6), use_cache=False, logits_to_keep=1)
    assert output.past_key_values is None


def test_output_forms() -> None:
    bank = entry(SHAPE)
    ids = bank.tokens(1, 4)
    with bank.using(), torch.no_grad():
        output = bank.compiled(input_ids=ids, logits_to_keep=1)
        logits, cache = bank.compiled(ids, logits_to_keep=1, return_dict=False)
        (alone,) = bank.compiled(ids, logits_to_keep=1, use_cache=False, return_dict=False)
    assert torch.equal(output.logits, logits)
    assert torch.equal(output.logits, alone)
    assert cache.get_seq_length() == output.past_key_values.get_seq_length() == 4


# Batches ----------------------------------------------------------------------------------------


@fewer(4)
@given(SEEDS)
def test_a_left_padded_batch_gives_each_rows_own_tokens(seed: int) -> None:
    bank = entry(SHAPE)
    ids, mask, rows = padded(bank, seed)
    with bank.using():
        result = bank.compiled.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for number, row in enumerate(rows):
            alone = bank.oracle.model.generate(
                row,
                max_new_tokens=6,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            assert torch.equal(result.sequences[number, -6:], alone.sequences[0, -6:])
            for mine, wanted in zip(result.logits, alone.logits, strict=True):
                assert_close(mine[number], wanted[0], 1e-5)


def test_a_left_padded_batch_under_a_plan() -> None:
    """One plan for the batch; padding is masked in chunks and decoded tokens as well."""
    bank = entry(SHAPE)
    ids, mask, _ = padded(bank)
    with bank.using(mixed_plan(bank)):
        tokens = assert_generates_the_same(bank, ids, attention_mask=mask)
        mask = torch.cat([mask, torch.ones(2, tokens.shape[1] - mask.shape[1] + 3)], 1).long()
        assert_generates_the_same(
            bank, torch.cat([tokens, bank.tokens(2, 3)], 1), attention_mask=mask
        )


def test_a_second_turn_of_a_left_padded_batch() -> None:
    bank = entry(SHAPE)
    ids, mask, _ = padded(bank)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with bank.using(mixed_plan(bank)):
        first = both(bank, ids, attention_mask=mask, **options)
        said = torch.cat([first[0].sequences, bank.tokens(2, 3, 5)], 1)
        mask = torch.cat([mask, torch.ones(2, said.shape[1] - mask.shape[1])], 1).long()
        mine, expected = (
            model.generate(said, attention_mask=mask, past_key_values=r.past_key_values, **options)
            for model, r in zip((bank.compiled, bank.oracle.model), first, strict=True)
        )
    assert torch.equal(mine.sequences, expected.sequences)


def test_padding_without_a_mask_gives_other_tokens() -> None:
    """The companion."""
    bank = entry(SHAPE)
    ids, _, rows = padded(bank)
    with bank.using():
        mask = torch.ones_like(ids)
        result = bank.compiled.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        alone = bank.oracle.model.generate(rows[1], max_new_tokens=6, do_sample=False)
    assert not torch.equal(result[1, -6:], alone[0, -6:])


def test_rows_that_end_early_are_padded() -> None:
    bank = entry(SHAPE)
    ids = bank.tokens(2, 6)
    with bank.using(mixed_plan(bank)):
        whole = assert_generates_the_same(bank, ids, max_new_tokens=12)
        first = whole[0, 6:].tolist()
        stop = next(t for t in first[:6] if t not in whole[1, 6:].tolist())
        pad = next(t for t in range(60) if t not in whole)
        tokens = assert_generates_the_same(
            bank, ids, max_new_tokens=12, eos_token_id=stop, pad_token_id=pad
        )
    ended = 6 + first.index(stop) + 1
    assert ended < 18
    assert (tokens[0, ended:] == pad).all()
    assert torch.equal(tokens[1], whole[1])


# Warm-up ----------------------------------------------------------------------------------------


def test_after_warm_up_a_request_captures_compiles_and_links_nothing() -> None:
    bank = entry("tied")
    runtime = bank.runtime
    with bank.using(bank.plan(["0.ffn"], factors={"0.ffn": 0.5})):
        runtime.warmup(max_length=40)
        live = len(runtime.live_caches())
        before = (runtime.counters.captures, runtime.pieces_compiled, runtime.counters.links)
        assert_generates_the_same(bank, bank.tokens(1, 9), max_new_tokens=5)
        after = (runtime.counters.captures, runtime.pieces_compiled, runtime.counters.links)
    assert after == before
    assert live == 0, "warm-up keeps no request alive"


def test_after_warm_up_only_the_learned_plan_is_linked() -> None:
    """Its pieces are there: a plan that is learned while decoding compiles nothing."""
    bank = entry("three_layers")
    runtime = bank.runtime
    names = [str(s) for s in bank.sublayers]
    profile = profile_of(bank, {**dict.fromkeys(names, 0.9), "1.attention": 0.6})
    plan = bank.plan(["1.attention"], factors=dict.fromkeys(["1.attention", *names[1::2]], 0.75))
    with bank.using(plan, AdaSkip(window=3), profile):
        runtime.warmup(max_length=40)
        before = (runtime.counters.captures, runtime.pieces_compiled, runtime.counters.links)
        result = bank.compiled.generate(
            bank.tokens(1, 9), max_new_tokens=9, do_sample=False, return_dict_in_generate=True
        )
        after = (runtime.counters.captures, runtime.pieces_compiled, runtime.counters.links)
    assert result.past_key_values.request.decode_plan != plan
    assert after == (before[0], before[1], before[2] + 1)
