"""Drafts where users' rules end rows, forbid tokens or raise, and an assistant is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from adaskip_fx.kv_cache.padding import LastMask, Padding
from adaskip_fx.model.assistant import Assistant
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.speculation.lookup import Lookup
from adaskip_fx.speculation.options import Bounded
from adaskip_fx.speculation.proposals import Context, Drafts, Proposer
from adaskip_fx.speculation.skipped import Skipped
from adaskip_fx.speculation.speculation import Speculation
from tests.support.drafts import Drafting, Oracle, drafting
from tests.support.generation import Collected

NEW = 24


def bank() -> Drafting:
    return drafting()


def generated(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    given = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(0)
    tokens: torch.Tensor = model.generate(ids, **{**given, **options})
    return tokens


def within(most: float, longest: int = 6) -> Speculation:
    """Have tokens stand within a bound."""
    model = bank()
    plan = SkipPlan.of(model.runtime.sublayers, ["0.ffn", "1.ffn"])
    decoding = Bounded((Skipped(),), longest, adaptive=False, max_divergence=most)
    model.runtime.speculation = found = Speculation(decoding, plan)
    return found


class LastTokenIn(StoppingCriteria):
    """A row ends with one of some tokens, of which no config knows."""

    def __init__(self, tokens: set[int]) -> None:
        self.tokens = torch.tensor(sorted(tokens))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


def test_rows_that_end_without_padding_go_on_as_the_model_does() -> None:
    model, ids = bank(), bank().tokens(3, 7)
    free = generated(model.model, ids)
    criteria = [LastTokenIn({int(free[0, 12])})]
    want = generated(model.model, ids, stopping_criteria=criteria)
    assert want.shape[1] > 14, "the other rows go on"
    model.begin(Skipped(SkipPlan.of(model.runtime.sublayers, ["0.ffn"])))
    assert torch.equal(generated(model.fast, ids, stopping_criteria=criteria), want)


@pytest.mark.parametrize("most", [0.02, 0.5])
def test_what_is_forbidden_is_not_released_within_a_bound(most: float) -> None:
    ids, even = bank().tokens(2, 7), list(range(0, bank().model.config.vocab_size, 2))
    within(most)
    got = generated(bank().fast, ids, prefix_allowed_tokens_fn=lambda row, text: even)
    assert (got[:, 7:] % 2 == 0).all()
    never = [LastTokenIn(set())]
    words = [[token] for token in even]
    got = generated(bank().fast, ids, bad_words_ids=words, stopping_criteria=never)
    assert (got[:, 7:] % 2 == 1).all()


def test_rows_that_have_ended_pay_nothing() -> None:
    ids = bank().tokens(3, 7)
    eos = int(generated(bank().model, ids)[0, 11])
    for most in (0.05, 0.5):
        stats = within(most).stats
        generated(bank().fast, ids, eos_token_id=eos, pad_token_id=0, max_new_tokens=40)
        assert stats.worst is not None
        assert stats.worst <= most * (1 + 1e-9)


class Raises(BaseStreamer):
    """Fails after so many tokens; keeps those that came."""

    def __init__(self, after: int) -> None:
        self.came, self.after = list[int](), after

    def put(self, value: torch.Tensor) -> None:
        self.came += value.flatten().tolist()
        if len(self.came) > self.after:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


def test_a_request_that_is_stopped_leaves_nothing_unverified() -> None:
    """Its text goes on on the same cache."""
    model, ids = bank(), bank().tokens(1, 14)
    want = generated(model.model, ids)
    model.begin(Oracle(want, wrong=6), longest=12)
    cache, streamer = model.fast.adaskip.new_cache(), Raises(16)
    with pytest.raises(KeyboardInterrupt):
        generated(model.fast, ids, past_key_values=cache, streamer=streamer)
    text = torch.tensor([streamer.came])
    assert torch.equal(text, want[:, : text.shape[1]])
    assert cache.length == text.shape[1] - 1
    rest = NEW - (text.shape[1] - 14)
    got = generated(model.fast, text, past_key_values=cache, max_new_tokens=rest)
    assert torch.equal(got, want)


@pytest.mark.parametrize("proposer", [Skipped(), Lookup()])
def test_a_prompt_of_embeddings_stays_where_its_request_is_stopped(proposer: Proposer) -> None:
    """Its tokens are in no text, but in the cache."""
    model, ids = bank(), bank().tokens(1, 14)
    embedded = {"inputs_embeds": model.model.get_input_embeddings()(ids)}
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    want = model.model.generate(**embedded, **options)
    model.begin(proposer, longest=3)
    assert torch.equal(model.fast.generate(**embedded, **options), want)
    cache, streamer = model.fast.adaskip.new_cache(), Raises(6)
    with pytest.raises(KeyboardInterrupt):
        model.fast.generate(**embedded, **options, past_key_values=cache, streamer=streamer)
    assert streamer.came == want[0, :7].tolist()
    assert cache.length == 14 + 7 - 1
    text = torch.cat((ids, want[:, :7]), 1)
    got = generated(model.fast, text, past_key_values=cache, max_new_tokens=NEW - 7)
    assert torch.equal(got[:, 14:], want)


@dataclass
class FailsAt(Oracle):
    """A proposer that fails when there are so many tokens."""

    place: int = 0

    def propose(self, context: Context, most: int) -> Drafts | None:
        if len(context.rows[0]) >= self.place:
            raise KeyboardInterrupt
        return super().propose(context, most)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("place", [17, 20, 23])
def test_a_request_whose_proposer_fails_goes_on_where_it_was(streams: bool, place: int) -> None:
    """Its text, as far as it was streamed, goes on on the same cache."""
    model, ids = bank(), bank().tokens(1, 14)
    want = generated(model.model, ids)
    model.begin(FailsAt(want, wrong=4, place=place), longest=3)
    cache, streamer = model.fast.adaskip.new_cache(), Collected()
    with pytest.raises(KeyboardInterrupt):
        generated(model.fast, ids, past_key_values=cache, streamer=streamer if streams else None)
    text = torch.tensor([streamer.tokens]) if streams else want[:, : cache.length + 1]
    assert torch.equal(text, want[:, : text.shape[1]])
    assert cache.length < text.shape[1]
    rest = NEW - (text.shape[1] - 14)
    model.begin(Oracle(want))
    got = generated(model.fast, text, past_key_values=cache, max_new_tokens=rest)
    assert torch.equal(got, want)


def test_a_plan_that_only_drafts_is_not_set() -> None:
    plan = SkipPlan.of(bank().runtime.sublayers, ["0.ffn"])
    with pytest.raises(ValueError, match="run in full, and its plan only drafts; compile again"):
        bank().fast.adaskip.plan = plan


class AssistedCandidateGenerator:
    """As transformers' one of this name: a cache, and what it gives next."""

    def __init__(self, stored: int) -> None:
        cache = DynamicCache()
        cache.update(torch.zeros(1, 1, stored, 2), torch.zeros(1, 1, stored, 2), 0)
        self.assistant_kwargs = {"past_key_values": cache}

    def get_candidates(self, text: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.cat((text, torch.tensor([[9, 9, 9]])), 1), None


def test_an_assistant_forgets_what_it_drafted_when_others_were_asked() -> None:
    class Request:
        model_kwargs = None

    class Context:
        samples = False
        input_ids = torch.tensor([[1, 2, 3, 4]])

    found = AssistedCandidateGenerator(0)
    assistant = Assistant(lambda text, kwargs: found, Request(), Context())  # type: ignore[arg-type]
    cache = found.assistant_kwargs["past_key_values"]
    assistant.propose(Context(), 3)  # type: ignore[arg-type]
    cache.update(torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2), 0)  # the text, and two drafts
    context = Context()
    context.input_ids = torch.tensor([[1, 2, 3, 4, 9, 7, 7, 7]])  # of which the first one stands
    assistant.propose(context, 3)  # type: ignore[arg-type]
    assert cache.get_seq_length() == 5


# What is kept of a block -------------------------------------------------------------------------


def test_what_is_recorded_of_a_token_keeps_no_other_alive() -> None:
    model, ids = bank(), bank().tokens(1, 14)
    model.begin(Oracle(generated(model.model, ids)), longest=6)
    asked = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    got: Any = generated(model.fast, ids, **asked)
    for values in (*got.scores, *got.logits):
        assert values.untyped_storage().nbytes() == values.numel() * values.itemsize


class Halves(LogitsProcessor):
    """Makes every second token very unlikely, in place."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, ::2] -= 4.0
        return scores


@pytest.mark.parametrize("in_place", [True, False])
def test_divergence_is_that_of_raw_logits(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a processor does to what it is given."""
    monkeypatch.setattr("adaskip_fx.model.blocks.remember_nothing", lambda rules: True)
    out_of_place = type("Copies", (Halves,), {"__call__": lambda s, i, x: x - 4.0 * (_even(x))})
    ids, spent = bank().tokens(2, 7), list[float]()
    for rule in (Halves() if in_place else out_of_place(), out_of_place()):
        stats = within(0.5).stats
        generated(bank().fast, ids, logits_processor=LogitsProcessorList([rule]))
        assert stats.divergence is not None
        spent.append(stats.divergence)
    assert spent[0] == pytest.approx(spent[1])
    assert spent[0] > 0


def _even(values: torch.Tensor) -> torch.Tensor:
    return (torch.arange(values.shape[-1]) % 2 == 0).to(values.dtype)


@pytest.mark.breaks
def test_logits_that_a_processor_has_changed_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    monkeypatch.setattr(
        "adaskip_fx.model.blocks.BlockRequest.process",
        lambda self, text, logits: self.call.logits_processor(text, logits),
    )
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        test_divergence_is_that_of_raw_logits(True, patch)


# Padding -----------------------------------------------------------------------------------------


def masks_read(monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the host reads a mask in a request of padded rows, of which many drafts stand."""
    model, ids = bank(), bank().tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    want = generated(model.model, ids, attention_mask=mask)
    model.begin(Oracle(want, wrong=3), Skipped(SkipPlan.of(model.runtime.sublayers, ["0.ffn"])))
    read, says = Padding.of.__func__, Padding.says  # type: ignore[attr-defined]
    count = [0]

    def counted(reads: Any) -> Any:
        def call(*given: Any) -> Any:
            count[0] += 1
            return reads(*given)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Padding, "of", classmethod(counted(read)))
        patch.setattr(Padding, "says", counted(says))
        assert torch.equal(generated(model.fast, ids, attention_mask=mask), want)
    return count[0]


def test_the_mask_of_padded_rows_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert masks_read(monkeypatch) == 1


@pytest.mark.breaks
def test_a_mask_that_is_read_in_every_round_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    monkeypatch.setattr(LastMask, "keep_first", lambda self, tokens: self.__init__())
    assert masks_read(monkeypatch) > 4
