"""The loop of `generate` when it runs ahead of the host, as on a GPU: nothing shows of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    Phi3Config,
    Phi3ForCausalLM,
    StoppingCriteria,
)

from adaskip_fx.api import build
from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.model import generation
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip
from adaskip_fx.speculation.acceptance import Sampling
from adaskip_fx.testing import plans
from tests.support.compiled_llamas import SEEDS, VOCABULARY, Entry, entry, fewer, profile_of
from tests.support.generation import (
    Collected,
    LastTokenIn,
    counted,
    mixed_plan,
    padded,
    running_ahead,
)

SHAPE = "grouped"


def generated(model: Any, ids: torch.Tensor, seed: int, **options: Any) -> tuple[Any, torch.Tensor]:
    """All that `generate` can return, and the next random number."""
    torch.manual_seed(seed)
    form = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    result = model.generate(ids, **form, **options)
    return result, torch.rand(1)


def assert_the_same(bank: Entry, ids: torch.Tensor, seed: int = 0, **options: Any) -> Any:
    """Ahead, not ahead, and the eager model; returns the first."""
    expected, expected_random = generated(bank.oracle.model, ids, seed, **options)
    plain, plain_random = generated(bank.compiled, ids, seed, **options)
    with running_ahead(bank):
        mine, random = generated(bank.compiled, ids, seed, **options)
    for result, drawn in ((mine, random), (plain, plain_random)):
        assert torch.equal(result.sequences, expected.sequences)
        assert torch.equal(drawn, expected_random), "as many random numbers were used"
        assert len(result.scores) == len(result.logits) == len(expected.scores)
        cache, wanted = result.past_key_values, expected.past_key_values
        assert cache.get_seq_length() == wanted.get_seq_length()
    for kind in ("scores", "logits"):
        pairs = zip(getattr(mine, kind), getattr(plain, kind), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), kind
    return mine


SAMPLING = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.7, 1.0, 3.0])},
    optional={
        "top_k": st.sampled_from([1, 5, 40]),
        "top_p": st.sampled_from([0.3, 0.9]),
        "min_p": st.just(0.05),
        "repetition_penalty": st.just(1.3),
    },
)


@fewer(2)
@given(st.data(), SAMPLING, SEEDS, st.integers(1, 10), st.integers(1, 2))
def test_the_same_tokens_ahead_or_not(
    data: st.DataObject, sampling: dict[str, Any], seed: int, new: int, rows: int
) -> None:
    bank = entry(SHAPE)
    ids = bank.tokens(rows, 5, seed)
    ends = data.draw(st.lists(st.integers(1, VOCABULARY - 1), max_size=20))
    stops = {"eos_token_id": ends, "pad_token_id": 0} if ends else {}
    if ends and data.draw(st.booleans()):
        stops["min_new_tokens"] = data.draw(st.integers(0, new))
    sample = data.draw(st.booleans())
    options = {"max_new_tokens": new, "do_sample": sample, "attention_mask": torch.ones_like(ids)}
    more = {"top_k": 0, **sampling} if sample else {}
    with bank.using(data.draw(plans(bank.sublayers))):
        assert_the_same(bank, ids, seed, **options, **stops, **more)


def test_a_step_too_many_is_taken_back() -> None:
    """A request that its tokens end; the cache that comes back is good for another turn."""
    bank = entry(SHAPE)
    ids = bank.tokens(1, 6)
    with bank.using(mixed_plan(bank)):
        whole = bank.oracle.model.generate(ids, max_new_tokens=9, do_sample=False)[0, 6:].tolist()
        stop = whole[4]
        new = whole.index(stop) + 1
        assert new >= 3, "else there was no step to run ahead of"
        options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": stop}
        with counted(bank) as steps:
            mine = assert_the_same(bank, ids, **options)
        assert steps.count(1) == 2 * (new - 1) + 1, "one step was too many, and only one"
        turns = []
        said = torch.cat([mine.sequences, bank.tokens(1, 3, 1)], 1)
        for model, cache in ((bank.compiled, mine.past_key_values), (bank.oracle.model, None)):
            turn = model.generate(said, past_key_values=cache, max_new_tokens=5, do_sample=False)
            turns.append(turn)
        assert torch.equal(*turns)


@pytest.mark.breaks
def test_a_step_that_is_not_taken_back_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: the comparison sees a token too many in the cache."""
    bank = entry(SHAPE)
    ids = bank.tokens(1, 6)
    with bank.using(mixed_plan(bank)):
        whole = bank.oracle.model.generate(ids, max_new_tokens=9, do_sample=False)[0, 6:].tolist()
        monkeypatch.setattr(SkipCache, "keep_first", lambda self, tokens: None)
        with pytest.raises(AssertionError):
            assert_the_same(bank, ids, max_new_tokens=9, do_sample=False, eos_token_id=whole[4])


class Fails(Collected):
    """A streamer that fails at the fourth token after a prompt of six."""

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.tokens) == 10:
            raise KeyboardInterrupt


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_that_a_streamer_stops_goes_on_where_it_was(ahead: bool) -> None:
    bank = entry(SHAPE)
    ids, options = bank.tokens(1, 6), {"max_new_tokens": 9, "do_sample": False}
    options["eos_token_id"] = VOCABULARY
    with bank.using():
        want = bank.compiled.generate(ids, **options)
        cache, streamer = bank.runtime.new_cache(), Fails()
        bank.runtime.ahead = ahead
        try:
            with pytest.raises(KeyboardInterrupt):
                bank.compiled.generate(ids, past_key_values=cache, streamer=streamer, **options)
        finally:
            bank.runtime.ahead = False
        text = torch.tensor([streamer.tokens])
        assert cache.length == text.shape[1] - 1, "all but the last token"
        rest = {**options, "max_new_tokens": 5}
        assert torch.equal(bank.compiled.generate(text, past_key_values=cache, **rest), want)


def test_no_step_too_many_where_the_length_is_the_end() -> None:
    bank = entry(SHAPE)
    with bank.using(), running_ahead(bank), counted(bank) as steps:
        bank.compiled.generate(bank.tokens(1, 6), max_new_tokens=5, do_sample=False)
    assert steps == [6, 1, 1, 1, 1]


def test_not_ahead_while_a_window_is_open() -> None:
    """What is learned online is the same, and no step is counted that was not wanted."""
    bank = entry("three_layers")
    names = [str(s) for s in bank.sublayers]
    profile = profile_of(bank, {**dict.fromkeys(names, 0.9), "1.attention": 0.6})
    plan = bank.plan(["1.attention"], factors=dict.fromkeys(["1.attention", *names[1::2]], 0.75))
    ids, options = bank.tokens(1, 9), {"do_sample": False, "return_dict_in_generate": True}
    learned = []
    with bank.using(plan, AdaSkip(window=5), profile), running_ahead(bank):
        for count in (1, 2, 5, 6, 8):
            part = bank.compiled.generate(
                ids, max_new_tokens=12, stopping_criteria=[LongerThan(8 + count)], **options
            )
            window = part.past_key_values.request.window
            assert part.sequences.shape[1] == 9 + count
            assert window is None if count == 1 else window.steps == min(count - 1, 5)
            learned.append(window is not None and window.closed)
    assert learned == [False, False, False, True, True]


@pytest.mark.parametrize("sample", [False, True])
def test_ahead_with_padding_streamer_and_criteria(sample: bool) -> None:
    bank = entry(SHAPE)
    ids, mask, _ = padded(bank)
    with bank.using(mixed_plan(bank)):
        options = {"do_sample": sample, "max_new_tokens": 8, "temperature": 2.0 if sample else None}
        assert_the_same(bank, ids, attention_mask=mask, **options)
        one = bank.tokens(1, 6)
        streams = []
        for model in (bank.compiled, bank.oracle.model):
            torch.manual_seed(1)
            streamer = Collected()
            with running_ahead(bank):
                tokens = model.generate(one, streamer=streamer, **options)
            assert streamer.tokens == tokens[0].tolist()
            assert streamer.ended
            streams.append(streamer.tokens)
        assert streams[0] == streams[1]
        criteria = [LastTokenIn({streams[0][9]})]
        mine = assert_the_same(bank, one, seed=1, stopping_criteria=criteria, **options)
        assert mine.sequences.shape[1] <= 10


class LongerThan(StoppingCriteria):
    """The length as a criterion that the loop does not know beforehand."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], input_ids.shape[1] > self.length)


class NotANumberAt(LogitsProcessor):
    """Breaks the scores of one row at the given length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            scores[-1, 3] = torch.nan
        return scores


@pytest.mark.parametrize("ahead", [False, True])
def test_scores_that_are_no_numbers_are_refused(ahead: bool) -> None:
    bank = entry(SHAPE)
    cache = bank.runtime.new_cache()
    processors = LogitsProcessorList([NotANumberAt(8)])
    options = {"do_sample": True, "max_new_tokens": 6, "logits_processor": processors}
    messages = []
    with bank.using():
        bank.runtime.ahead = ahead
        try:
            for model, held in ((bank.compiled, cache), (bank.oracle.model, None)):
                with pytest.raises(RuntimeError, match="`inf`, `nan`") as caught:
                    model.generate(bank.tokens(2, 5), past_key_values=held, **options)
                messages.append(str(caught.value))
        finally:
            bank.runtime.ahead = False
    assert messages[0] == messages[1]
    assert cache.length == 8, "what was begun is taken back"


def test_the_draw_is_that_of_torch() -> None:
    """Of distributions with zeros, ties and tiny values."""
    scores = torch.randn(4, 50)
    scores[0, 10:] = -torch.inf
    scores[1] = 0.0
    scores[2, 7] = 30.0
    for seed in range(50):
        torch.manual_seed(seed)
        mine, invalid = Sampling().choose(scores)
        torch.manual_seed(seed)
        theirs = torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)
        assert torch.equal(mine, theirs)
        assert not invalid


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_one_number_tells_whether_a_row_is_valid(broken: float) -> None:
    scores = torch.randn(3, 20)
    scores[1, 11] = broken
    assert Sampling().choose(scores)[1]
    scores[1] = -torch.inf  # nothing is left to draw
    assert Sampling().choose(scores)[1]


# A cache that the model drops --------------------------------------------------------------------

SWITCH = 12  # tokens after which Phi-3 begins anew, for the sake of another table of positions
PROMPT = torch.arange(5, 14).unsqueeze(0)


@functools.cache
def phi3() -> tuple[Any, Any]:
    """A model that drops its cache when a text gets longer than that, and the same compiled."""
    config = Phi3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        original_max_position_embeddings=SWITCH,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    if model.generate(PROMPT, **options).past_key_values.get_seq_length() < SWITCH:
        pytest.skip("this transformers (5.17 does) forgets the text when Phi-3 drops its cache")
    return model, build(model, None, backend="eager")


@contextmanager
def lengths(compiled: Any) -> Iterator[list[tuple[int, SkipPlan]]]:
    """How many tokens each step of the compiled model has, and its plan."""
    steps: list[tuple[int, SkipPlan]] = []
    runtime_of(compiled).observer = lambda program, plan, tokens: steps.append((tokens, plan))
    try:
        yield steps
    finally:
        runtime_of(compiled).observer = None


@pytest.mark.parametrize("way", ["loop", "loop, ahead", "transformers' loop"])
def test_a_cache_that_the_model_drops_is_followed(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The request goes on with its own plan; what comes back holds what was run."""
    model, compiled = phi3()
    if way == "transformers' loop":
        monkeypatch.setattr(generation, "serves", lambda *args: False)
    plan = SkipPlan.of(compiled.adaskip.sublayers, ["1.attention"])
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(PROMPT, **options)
    runtime_of(compiled).ahead = way == "loop, ahead"
    try:
        plain = compiled.generate(PROMPT, **options)
        first = compiled.adaskip.new_cache(plan=plan)
        with lengths(compiled) as steps:
            mine = compiled.generate(PROMPT, past_key_values=first, **options)
    finally:
        runtime_of(compiled).ahead = False
    assert torch.equal(plain.sequences, expected.sequences)
    length = plain.past_key_values.get_seq_length()
    assert length == expected.past_key_values.get_seq_length() == 16
    counts = [tokens for tokens, _ in steps]
    assert counts == [9, 1, 1, 1, SWITCH + 1, 1, 1, 1], "all of the text ran again"
    assert all(used == plan for _, used in steps)
    cache = mine.past_key_values
    assert cache is not first
    assert (cache.get_seq_length(), first.get_seq_length()) == (16, SWITCH)
    assert cache.stored == first.stored == (True, False)


@pytest.mark.breaks
def test_a_cache_that_is_not_followed_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: the request that begins in the middle has the model's plan."""
    _, compiled = phi3()
    monkeypatch.setattr(SkipCache, "new_request", lambda self: compiled.adaskip.new_cache())
    with pytest.raises(AssertionError):
        test_a_cache_that_the_model_drops_is_followed(monkeypatch, "loop")


def test_stop_tokens_are_the_requests_when_its_cache_is_dropped() -> None:
    _, compiled = phi3()
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    result = compiled.generate(PROMPT, eos_token_id=[60], **options)
    stops = result.past_key_values.request.stop_tokens
    assert result.past_key_values.get_seq_length() > SWITCH
    assert stops.tolist() == [60, 0]


@pytest.mark.parametrize("more", [3, 4, 5])
def test_a_step_that_began_the_text_anew_is_taken_back(more: int) -> None:
    """The step too many may be the one that drops the cache: the one before comes back."""
    model, compiled = phi3()
    said = model.generate(PROMPT, max_new_tokens=more, do_sample=False)[0, -1].item()
    options = {"eos_token_id": said, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(PROMPT, return_dict_in_generate=True, **options)
    runtime_of(compiled).ahead = True
    try:
        mine = compiled.generate(PROMPT, return_dict_in_generate=True, **options)
    finally:
        runtime_of(compiled).ahead = False
    assert torch.equal(mine.sequences, expected.sequences)
    length = expected.past_key_values.get_seq_length()
    assert mine.past_key_values.get_seq_length() == length


def test_a_prompt_that_is_longer_fills_the_cache_that_was_passed() -> None:
    _, compiled = phi3()
    cache = compiled.adaskip.new_cache()
    ids = torch.arange(1, SWITCH + 4).unsqueeze(0)
    compiled.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert cache.get_seq_length() == SWITCH + 5
