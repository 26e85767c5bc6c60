"""Decoding with drafts gives what the eager model gives without, whoever drafts."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LogitsProcessorList, StoppingCriteriaList

import adaskip_fx
from adaskip_fx import Lossless, SkipPlan, UnsupportedError
from adaskip_fx.api import build
from adaskip_fx.capture.phase_graph import CapturedPhase
from adaskip_fx.model.drafted import DraftedRequest
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.runtime import request_step
from adaskip_fx.runtime.draft_with import draft_with
from adaskip_fx.runtime.static_runner import StaticRunner
from adaskip_fx.speculation.acceptance import Greedy, Sampling
from adaskip_fx.speculation.lookup import Lookup
from adaskip_fx.speculation.proposals import Proposer
from adaskip_fx.speculation.skipped import Skipped
from tests.support.characters import character_tokenizer
from tests.support.compiled_llamas import make_model, stored
from tests.support.drafts import AlwaysAccepts, Drafting, DrawsAnew, Oracle, drafting
from tests.support.generation import Collected, LastTokenIn
from tests.support.hybrids import hybrid

NEW = 24
PROPOSERS: dict[str, Callable[[torch.Tensor], Proposer]] = {
    "lookup": lambda text: Lookup(),
    "skipped": lambda text: Skipped(),
    "right": Oracle,
    "wrong": lambda text: Oracle(text, wrong=1),
    "partly": lambda text: Oracle(text, wrong=3),
}
#: Of a graph that others have shown to work, these two are enough in `make test`.
OFTEN = ("skipped", "partly")
proposers = pytest.mark.parametrize("kind", PROPOSERS)
some = pytest.mark.parametrize(
    "kind", [k if k in OFTEN else pytest.param(k, marks=pytest.mark.slow) for k in PROPOSERS]
)


def prompt(bank: Drafting, batch: int = 1) -> torch.Tensor:
    """Tokens that come again, so that there is something to look up."""
    ids = bank.tokens(batch, 9, 3)
    return torch.cat((ids, ids[:, :5]), 1)


def padded_prompt(bank: Drafting) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = prompt(bank, 3), torch.ones(3, 14, dtype=torch.int64)
    mask[1, :4], mask[2, :1] = 0, 0
    return ids, mask


def generated(model: Any, ids: torch.Tensor, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    given["attention_mask"] = torch.ones_like(ids)
    return model.generate(ids, **{**given, **options})


def assert_same(bank: Drafting, kind: str, ids: torch.Tensor, **options: Any) -> Any:
    """Both generate the same tokens; returns what was counted."""
    want = generated(bank.model, ids, **options)
    counted = bank.begin(PROPOSERS[kind](want)).stats
    assert torch.equal(generated(bank.fast, ids, **options), want)
    return counted


# The same tokens ---------------------------------------------------------------------------------


@some
def test_one_row_on_a_static_cache(kind: str) -> None:
    bank = drafting(static=True)
    assert_same(bank, kind, prompt(bank))
    assert not bank.runtime.runner.static._refused, "blocks are verified there as well"


@proposers
def test_one_row(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    bank = drafting()
    with caplog.at_level(logging.INFO, "adaskip_fx.model"):
        counted = assert_same(bank, kind, prompt(bank))
    parts = f"{counted.verifications} verifications and {counted.steps} plain steps"
    assert caplog.messages == [f"{NEW} tokens in {parts}"]
    assert counted.tokens == NEW
    assert counted.tokens_per_step == (NEW - 1) / (counted.verifications + counted.steps)
    if kind == "right":
        assert counted.verifications == 5, "a token of the prompt, 4 x 5 + 3"
        assert counted.steps == 0
    if kind == "wrong":
        assert counted.verifications == NEW - 2, "and a plain step where one token is left"
        assert counted.proposers["oracle"].accepted == [0, 0, 0, 0]


@some
@pytest.mark.parametrize("options", [{}, {"eos_token_id": [5, 17, 33]}])
def test_rows_that_begin_with_padding(kind: str, options: dict[str, Any]) -> None:
    bank = drafting()
    ids, mask = padded_prompt(bank)
    assert_same(bank, kind, ids, attention_mask=mask, **options)


@pytest.mark.breaks
@pytest.mark.parametrize("what", ["acceptance", "rollback", "K/V"])
def test_what_is_done_wrongly_shows(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion, of each of the three things that there are to do."""
    bank, kind = drafting(), "partly"
    if what == "acceptance":
        monkeypatch.setattr(Greedy, "accepts", lambda *a: a[2].tokens >= 0)
        monkeypatch.setattr("adaskip_fx.model.best_blocks.best_of_rows", _all_stand)
    elif what == "rollback":
        keep_first = bank.runtime.new_cache().keep_first.__func__  # type: ignore[attr-defined]
        monkeypatch.setattr(
            "adaskip_fx.kv_cache.cache.SkipCache.keep_first",
            lambda cache, tokens: keep_first(cache, tokens + 1),
        )
    else:  # drafts are verified by what drafted them, whose K/V stay
        kind, run = "skipped", request_step._run
        plan = bank.begin(Skipped()).plan

        def skips(runtime: Any, phase: Any, decoded: bool, *rest: Any) -> torch.Tensor:
            cache = rest[1]
            if decoded:
                cache.request.decode_with(plan)
            return run(runtime, phase, decoded, *rest)

        monkeypatch.setattr(request_step, "_run", skips)
    with pytest.raises((AssertionError, ValueError)):
        assert_same(bank, kind, prompt(bank))


def _all_stand(drafts: Any, best: Any, *rest: Any) -> Any:
    return len(drafts[0]), [list(column) for column in zip(*best, strict=True)], rest[0]


@some
def test_what_is_stored_is_what_is_stored_without_drafts(kind: str) -> None:
    bank, options = drafting(), {"return_dict_in_generate": True, "max_new_tokens": 15}
    want = generated(bank.model, prompt(bank), **options)
    bank.begin(PROPOSERS[kind](want.sequences))
    cache = generated(bank.fast, prompt(bank), **options).past_key_values
    assert cache.get_seq_length() == want.past_key_values.get_seq_length() == 28
    for mine, layer in zip(stored(cache), want.past_key_values.layers, strict=True):
        assert mine is not None
        for a, b in zip(mine, (layer.keys, layer.values), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# What else may be asked for ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"eos_token_id": 34},
        {"min_new_tokens": 20, "eos_token_id": [5, 17, 33]},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {
            "bad_words_ids": [[3], [4, 5]],
            "exponential_decay_length_penalty": (3, 1.2),
            "eos_token_id": 9,
        },
    ],
)
def test_what_a_config_asks_for(options: dict[str, Any]) -> None:
    bank = drafting()
    for kind in ("partly", "skipped"):
        assert_same(bank, kind, prompt(bank), **options)


def test_rules_that_remember_are_asked_about_each_token_once_and_in_order() -> None:
    bank = drafting()

    class Remembers:
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
            self.seen.append(input_ids[0].tolist())
            return scores + len(self.seen) % 5 * torch.arange(scores.shape[1]) / 8

    class Ends(LastTokenIn):
        def __init__(self) -> None:
            super().__init__({60})
            self.seen: list[list[int]] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.seen.append(input_ids[0].tolist())
            return super().__call__(input_ids, scores)

    seen: list[Any] = []
    for model in (bank.model, bank.fast):
        rules = Remembers(), Ends()
        options = {
            "logits_processor": LogitsProcessorList([rules[0]]),
            "stopping_criteria": StoppingCriteriaList([rules[1]]),
        }
        if model is bank.fast:
            bank.begin(Oracle(seen[0][0], wrong=3))
        seen.append((generated(model, prompt(bank), **options), [rule.seen for rule in rules]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]
    assert bank.fast.adaskip.drafts.proposers["oracle"].accepted[0] > 0


def test_two_texts_of_guidance() -> None:
    """Its processor runs the model itself, token by token."""
    bank = drafting()
    assert_same(bank, "partly", prompt(bank), guidance_scale=1.5)


def test_stop_strings() -> None:
    bank, tokenizer = drafting(), character_tokenizer()
    free = generated(bank.model, prompt(bank))[0, 14:].tolist()
    words = tokenizer.decode(free[7:9])
    assert_same(bank, "right", prompt(bank), stop_strings=[words], tokenizer=tokenizer)


def test_rows_of_one_prompt() -> None:
    bank = drafting()
    bank.begin(Skipped())
    got = generated(bank.fast, prompt(bank), num_return_sequences=3, do_sample=True)
    assert got.shape == (3, 14 + NEW)
    assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize("kind", ["right", "partly", "skipped"])
def test_all_that_is_returned_and_streamed(kind: str) -> None:
    bank = drafting()
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    asked |= {"repetition_penalty": 1.3, "eos_token_id": 59}
    streams = [Collected(), Collected()]
    want = generated(bank.model, prompt(bank), streamer=streams[0], **asked)
    bank.begin(PROPOSERS[kind](want.sequences))
    got = generated(bank.fast, prompt(bank), streamer=streams[1], **asked)
    assert torch.equal(got.sequences, want.sequences)
    assert streams[0].tokens == streams[1].tokens == got.sequences[0].tolist()
    assert streams[1].ended
    for what in ("scores", "logits"):
        mine, theirs = getattr(got, what), getattr(want, what)
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@some
def test_another_turn(kind: str) -> None:
    bank = drafting()
    first = generated(bank.model, prompt(bank), return_dict_in_generate=True)
    text = torch.cat((first.sequences, bank.tokens(1, 3, 8)), 1)
    want = generated(bank.model, text, past_key_values=first.past_key_values)
    bank.begin(PROPOSERS[kind](want))
    mine = generated(bank.fast, prompt(bank), return_dict_in_generate=True)
    got = generated(bank.fast, text, past_key_values=mine.past_key_values)
    assert torch.equal(got, want)
    assert mine.past_key_values.drafting is None


def test_a_prompt_that_is_given_by_embeddings() -> None:
    bank = drafting()
    embeds = bank.model.get_input_embeddings()(prompt(bank)).detach()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = bank.model.generate(inputs_embeds=embeds, **options)
    for kind in ("lookup", "skipped"):
        bank.begin(PROPOSERS[kind](want))
        assert torch.equal(bank.fast.generate(inputs_embeds=embeds, **options), want)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"use_cache": False}])
def test_ways_that_have_no_drafts_run_in_full(options: dict[str, Any]) -> None:
    bank = drafting()
    counted = assert_same(bank, "right", prompt(bank), max_new_tokens=6, **options)
    assert counted.tokens == 0


@pytest.mark.parametrize("kind", ["lookup", "skipped", "right"])
def test_ahead_of_the_host(kind: str) -> None:
    """A step is begun before its token is known where there was nothing to propose."""
    bank = drafting()
    bank.runtime.ahead = True
    try:
        counted = assert_same(bank, kind, prompt(bank))
    finally:
        bank.runtime.ahead = False
    assert counted.tokens == NEW


@pytest.mark.parametrize("batch", [1, 2])
def test_whatever_the_clock_says(batch: int) -> None:
    """Blocks of other lengths, by other proposers, give the same tokens."""
    bank, chance = drafting(), random.Random(1)
    now = itertools.accumulate(chance.choice([0.1, 1.0, 5.0]) for _ in itertools.count())
    ids = prompt(bank, batch)
    want = generated(bank.model, ids, max_new_tokens=60)
    proposers = Lookup(), Skipped(), Oracle(want, wrong=7)
    counted = bank.begin(*proposers, longest=15, clock=lambda: next(now)).stats
    for _ in range(3):
        assert torch.equal(generated(bank.fast, ids, max_new_tokens=60), want)
    assert counted.steps > 3, "times of plain steps are taken"
    lengths = counted.proposers["oracle"].drafted
    assert lengths[0] > lengths[-1], "and blocks of several lengths"


# Assistants of transformers' ---------------------------------------------------------------------


@functools.cache
def assistants() -> dict[str, dict[str, Any]]:
    other = make_model("one_layer", torch.float64, seed=5)
    itself = copy.deepcopy(drafting().model)
    itself.generation_config.assistant_confidence_threshold = 0.0  # drafts do not end early
    return {
        "another model": {"assistant_model": other},
        "another model, compiled": {"assistant_model": build(other, None, backend="eager")},
        "the model itself": {"assistant_model": itself},
        "the text": {"prompt_lookup_num_tokens": 3},
    }


ASSISTANTS = (
    *("another model", "the text"),
    pytest.param("another model, compiled", marks=pytest.mark.slow),
    pytest.param("the model itself", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("kind", ASSISTANTS)
def test_assistants_go_through_the_same_loop(kind: str) -> None:
    bank, streamer = drafting(), Collected()
    want = generated(bank.model, prompt(bank), eos_token_id=59)
    counted = bank.begin(Lookup(least=9)).stats
    options = {"eos_token_id": 59, "streamer": streamer, **assistants()[kind]}
    assert torch.equal(generated(bank.fast, prompt(bank), **options), want)
    assert streamer.tokens == want[0].tolist()
    assert counted.tokens == want.shape[1] - 14
    if kind == "the model itself":
        assert counted.proposers["assistant"].acceptance == (1.0, 1.0, 1.0, 1.0)


def test_an_assistants_draws_are_accepted_by_their_probabilities() -> None:
    """Of the model itself all are."""
    bank = drafting()
    counted = bank.begin(Lookup(least=9)).stats
    options = {"do_sample": True, "top_k": 0, **assistants()["the model itself"]}
    generated(bank.fast, prompt(bank), **options)
    assert counted.proposers["assistant"].acceptance == (1.0, 1.0, 1.0, 1.0)


def test_an_assistant_of_several_rows_is_refused_as_in_transformers() -> None:
    bank = drafting()
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        generated(bank.fast, prompt(bank, 2), **assistants()["another model"])


# Sampling ----------------------------------------------------------------------------------------


@torch.no_grad()
def likely(model: Any, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """The probability of the second and third new token, [V, V], of the eager model."""
    size = model.config.vocab_size
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    rows = torch.cat((ids.expand(len(pairs), -1), pairs), 1)
    first, second, third = torch.softmax(model(rows).logits[:, -3:] / temperature, -1).unbind(1)
    each = torch.arange(len(pairs))
    before = first[each, pairs[:, 0]] * second[each, pairs[:, 1]]
    joint: torch.Tensor = (before.unsqueeze(1) * third).view(size, size, size).sum(0)
    return joint


@functools.cache
def small() -> Drafting:
    """A model of seven tokens."""
    config = make_model("grouped").config
    config.vocab_size = 7
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.float64).eval()
    plain = build(model, None, backend="eager")
    plan = SkipPlan.of(plain.adaskip.sublayers, ["1.attention", "0.ffn"])
    return Drafting(model, build(model, plan, decoding=Lossless(), backend="eager"), plan)


def distance(bank: Drafting, requests: int, rows: int) -> float:
    """The chi-square statistic of sampled continuations, over the number of its degrees."""
    ids, temperature = torch.tensor([[1, 2, 3, 1, 2]]), 1.5
    chances = likely(bank.model, ids, temperature).double()
    size = chances.shape[0]
    counts = torch.zeros(size * size, dtype=torch.float64)
    options = {"do_sample": True, "temperature": temperature, "max_new_tokens": 4, "top_k": 0}
    for seed in range(requests):
        got = generated(bank.fast, ids, seed, num_return_sequences=rows, **options)
        pairs = got[:, 6] * size + got[:, 7]
        counts += torch.bincount(pairs, minlength=size * size)
    expected = chances.flatten() * requests * rows
    often = expected >= 5
    parts = ((counts - expected) ** 2 / expected)[often]
    rest, of_rest = counts[~often].sum(), expected[~often].sum()
    if of_rest > 0:
        parts = torch.cat((parts, ((rest - of_rest) ** 2 / of_rest).view(1)))
    return float(parts.sum() / (len(parts) - 1))


@pytest.mark.parametrize(
    ("proposer", "rows"),
    [
        (Skipped(), 1),
        pytest.param(Skipped(), 6, marks=pytest.mark.slow),
        pytest.param(Lookup(least=1), 1, marks=pytest.mark.slow),
        pytest.param(Lookup(least=1), 6, marks=pytest.mark.slow),
    ],
)
def test_sampled_tokens_have_the_full_models_probabilities(proposer: Proposer, rows: int) -> None:
    bank = small()
    counted = bank.begin(proposer).stats
    assert distance(bank, 300 if rows == 1 else 200, rows) < 1.8
    accepted = counted.proposers[proposer.name].acceptance[0]
    assert accepted < 0.98
    if rows == 1:
        assert accepted > 0.1, "some drafts stand and some do not"


@pytest.mark.breaks
@pytest.mark.parametrize("what", ["accepts", "replace"])
def test_a_wrong_acceptance_shows(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    wrong = AlwaysAccepts if what == "accepts" else DrawsAnew
    monkeypatch.setattr(Sampling, what, getattr(wrong, what))
    bank = small()
    bank.begin(Skipped())
    assert distance(bank, 150, 6) > 2.5


# Refusals ----------------------------------------------------------------------------------------


def test_without_a_profile_drafts_are_looked_up() -> None:
    decoding = Lossless(adaptive=False)
    fast = adaskip_fx.compile(make_model("one_layer"), decoding=decoding, backend="eager")
    ids = torch.tensor([[4, 5, 6, 7, 4, 5]])
    assert generated(fast, ids).shape == (1, 6 + NEW)
    assert fast.adaskip.drafts is not None
    assert "skipped" not in fast.adaskip.drafts.proposers
    assert "no plan: looked up in the text" in str(fast.adaskip)
    assert "off: requests run in full" in str(fast.adaskip)


def test_nothing_is_captured_or_linked_after_a_warmup() -> None:
    model = make_model("one_layer")
    plan = SkipPlan.of(drafting("one_layer", ("0.ffn",)).runtime.sublayers, ["0.ffn"])
    decoding = Lossless((Lookup(), Skipped()), adaptive=False)
    fast = build(model, plan, decoding=decoding, backend="eager")
    fast.adaskip.warmup(60)
    before = fast.adaskip.stats()
    for seed in range(2):
        ids = torch.tensor([[4, 5, 6, 7, 4, 5]]) + seed
        generated(fast, ids)
    after = fast.adaskip.stats()
    assert (after.captures, after.links) == (before.captures, before.links)
    assert set(fast.adaskip.drafts.proposers) == {"lookup", "skipped"}


def test_what_was_counted_is_shown() -> None:
    bank = drafting()
    bank.begin(Skipped())
    generated(bank.fast, prompt(bank))
    report = str(bank.fast.adaskip)
    assert "skips 1 of 4 sublayers" in report
    assert f"{NEW} tokens in" in report
    assert "accepted by position" in report


def test_a_state_cannot_be_taken_back() -> None:
    _, compiled = hybrid()
    with pytest.raises(UnsupportedError, match="which cannot forget a token that was drafted"):
        draft_with(runtime_of(compiled), Lossless())
    assert compiled.adaskip.drafts is None


def test_several_plans_do_not_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = drafting().runtime
    schedule = Schedule(((0, SkipPlan.empty(runtime.sublayers)),))
    monkeypatch.setattr(runtime, "plan", schedule)
    with pytest.raises(ValueError, match="drafts are decoded with one plan, but a schedule has"):
        draft_with(runtime, Lossless())


def test_options_that_mean_nothing() -> None:
    for longest in (0, 32, 2.5):
        with pytest.raises(ValueError, match=r"must be 1 to 31"):
            Lossless(longest=longest)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one proposer"):
        Lossless(())
    with pytest.raises(TypeError, match="decoding must be"):
        draft_with(drafting().runtime, 4)  # type: ignore[arg-type]


def test_a_block_ends_before_another_set_of_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = drafting()
    monkeypatch.setattr("adaskip_fx.model.draftable.switches_at", lambda model: [22])
    verify, blocks = DraftedRequest._verify, list[int]()

    def verifies(self: Any, drafts: Any) -> Any:
        blocks.append(self.cache.length + 1 + drafts.count)
        return verify(self, drafts)

    monkeypatch.setattr(DraftedRequest, "_verify", verifies)
    assert_same(bank, "right", prompt(bank))
    assert max(blocks) == 22
    assert len(blocks) >= 2


def test_what_blocks_need_is_looked_up_before_the_first() -> None:
    """In a request after another on its buffers: a device reads the prompt meanwhile."""
    bank = drafting(static=True)
    ids = prompt(bank)
    want = generated(bank.model, ids)
    looked = looks_during_blocks(bank, ids, want)
    assert looked[0], "the first request looks weights up when it needs them"
    assert not looked[1]
    with pytest.MonkeyPatch.context() as patch:  # the companion
        patch.setattr(StaticRunner, "look_up", lambda *given: None)
        assert looks_during_blocks(bank, ids, want)[1]


def looks_during_blocks(bank: Drafting, ids: torch.Tensor, text: torch.Tensor) -> list[int]:
    """How often weights were looked up while blocks were verified, by request."""
    bank.runtime.free()
    found, inside = list[int](), [False]
    verify, weights = DraftedRequest._verify, CapturedPhase.weights

    def verifies(request: DraftedRequest, drafts: Any) -> Any:
        inside[0] = True
        try:
            return verify(request, drafts)
        finally:
            inside[0] = False

    def looks(captured: CapturedPhase, arguments: Any) -> Any:
        found[-1] += inside[0]
        return weights(captured, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftedRequest, "_verify", verifies)
        patch.setattr(CapturedPhase, "weights", looks)
        for _ in range(2):
            found.append(0)
            bank.begin(Oracle(text), longest=3)
            assert torch.equal(generated(bank.fast, ids), text)
    return found
