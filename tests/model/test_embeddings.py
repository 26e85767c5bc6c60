"""A prompt that is given by embeddings: the eager model's logits; with a plan, the oracle's.

The embeddings are random: no token has them, so whoever looks ids up gives other logits.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from adaskip_fx.api import build
from adaskip_fx.contrib.routing import Choice, Option
from adaskip_fx.model import checked_call, forward
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip
from adaskip_passes import UnsupportedError
from tests.support.compiled_families import compiled_family
from tests.support.compiled_llamas import Entry, entry, fixed, make_model, profile_of
from tests.support.eager_reference import assert_close
from tests.support.generation import running_ahead

FAMILIES = (
    *("gemma", "mamba"),  # which scales its embeddings; which has no positions
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "mixtral")),
)
LEFT = torch.ones(2, 9, dtype=torch.int64)
LEFT[0, :3] = 0
RIGHT = LEFT.flip(1)
IDS = torch.tensor([[5, 9, 3, 22, 41, 8, 17, 2, 30], [4, 4, 31, 7, 50, 12, 6, 1, 19]])


def drawn(model: Any, tokens: int = 9, rows: int = 2, seed: int = 0) -> torch.Tensor:
    """Random embeddings [rows, tokens, H]."""
    width = model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, width, generator=generator)


CASES: dict[str, dict[str, Any]] = {
    "all logits": {},
    "the last token's": {"logits_to_keep": 1},
    "some": {"logits_to_keep": torch.tensor([5, 0, -1])},
    "padded on the left": {"attention_mask": LEFT},
    "padded on the right": {"attention_mask": RIGHT},
    "of the last, padded": {"attention_mask": LEFT, "logits_to_keep": 1},
    "no cache": {"use_cache": False},
    "labels": {"labels": IDS},
    "positions": {"position_ids": torch.arange(9).expand(2, 9) + 3},
}


class Pair:
    """A model, and the same compiled."""

    def __init__(self, model: Any, compiled: Any = None) -> None:
        self.model, self.compiled = model, compiled or build(model, None, backend="eager")

    @torch.no_grad()
    def check(self, embeddings: torch.Tensor, **arguments: Any) -> None:
        """Compare a call with the eager model's; AssertionError on a difference."""
        given = {"inputs_embeds": embeddings, **arguments}
        got, want = self.compiled(**given), self.model(**given)
        mask = arguments.get("attention_mask", torch.ones(embeddings.shape[:2]))
        real = mask.bool()[:, -want.logits.shape[1] :]  # (the padding's own logits mean nothing)
        assert_close(got.logits[real], want.logits[real], 1e-5, "logits")
        if want.loss is not None:
            assert_close(got.loss, want.loss, 1e-5, "loss")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(*compiled_family(request.param))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_models_own(pair: Pair, case: str) -> None:
    arguments = CASES[case]
    if case == "positions" and pair.model.config.model_type == "mamba":
        pytest.skip("it has no positions")
    pair.check(drawn(pair.model), **arguments)


def test_one_embedding(pair: Pair) -> None:
    pair.check(drawn(pair.model, 1))


def test_other_embeddings_are_found(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: those of the last rows, first."""
    inner = forward.checked_tokens
    monkeypatch.setattr(forward, "checked_tokens", lambda *given: inner(*given).flip(0))
    with pytest.raises(AssertionError, match="logits: relative error"):
        pair.check(drawn(pair.model))


def test_embeddings_of_ids_say_what_the_ids_say(pair: Pair) -> None:
    with torch.no_grad():
        embedded = pair.model.get_input_embeddings()(IDS)
        got = pair.compiled(inputs_embeds=embedded).logits
        assert_close(got, pair.compiled(IDS).logits, 1e-5, "logits")


@pytest.mark.parametrize("mask", [None, LEFT], ids=["", "padded"])
@pytest.mark.parametrize("more", [{}, {"do_sample": True, "top_k": 9}], ids=["greedy", "sampling"])
@pytest.mark.parametrize("ids", [None, IDS], ids=["", "and ids"])
def test_generate_goes_on_with_ids(
    pair: Pair, mask: torch.Tensor | None, more: dict[str, Any], ids: torch.Tensor | None
) -> None:
    """With ids besides, transformers puts them before what is new."""
    options = {
        "inputs_embeds": drawn(pair.model),
        "attention_mask": mask if mask is not None else torch.ones_like(LEFT),
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
        **more,
    }
    found = []
    for model in (pair.model, pair.compiled):
        torch.manual_seed(3)
        found.append(model.generate(ids, **options))
    assert torch.equal(found[1], found[0])


def test_all_lengths_are_one_graph() -> None:
    pair = Pair(make_model("one_layer"))
    pair.compiled(IDS)
    before = pair.compiled.adaskip.stats().captures
    for tokens in (9, 2, 5, 30):
        pair.check(drawn(pair.model, tokens, rows=1), logits_to_keep=1)
    assert pair.compiled.adaskip.stats().captures == before + 1
    pair.compiled(IDS)
    assert pair.compiled.adaskip.stats().captures == before + 1, "ids have the graph they had"


# Requests ---------------------------------------------------------------------------------------


def steps(model: Any) -> list[dict[str, torch.Tensor]]:
    """A request of every kind of step: embeddings, ids, embeddings after ids, one embedding."""
    return [
        {"inputs_embeds": drawn(model, 6, 1)},
        {"input_ids": IDS[:1, :1]},
        {"inputs_embeds": drawn(model, 4, 1, seed=1)},
        {"input_ids": IDS[:1, 1:4]},
        {"inputs_embeds": drawn(model, 1, 1, seed=2)},
        {"input_ids": IDS[:1, 4:5]},
    ]


def follow(bank: Entry) -> None:
    """A request beside the oracle, whose plan `bank.using` has set; AssertionError if they part."""
    cache, reference = bank.runtime.new_cache(), bank.reference_cache()
    with torch.no_grad():
        for number, given in enumerate(steps(bank.model)):
            got = bank.compiled(**given, past_key_values=cache).logits
            want = bank.oracle.model(**given, past_key_values=reference).logits
            assert_close(got, want, 1e-5, f"logits of step {number}")
            assert cache.get_seq_length() == reference.get_seq_length()


@pytest.mark.parametrize("bank_of", [entry, fixed])
@pytest.mark.parametrize(
    ("skipped", "factors"),
    [([], {}), (["0.ffn", "1.attention"], {"0.ffn": 1.2}), (["0.attention", "0.ffn"], {})],
    ids=str,
)
def test_a_request_under_a_plan(
    bank_of: Any, skipped: list[str], factors: dict[str, float]
) -> None:
    bank = bank_of("grouped")
    with bank.using(bank.plan(skipped, ["1.ffn"], factors=factors)):
        follow(bank)
    if skipped:  # the companion
        with bank.using():
            bank.runtime.plan = bank.plan(skipped, factors=factors)
            with pytest.raises(AssertionError, match="logits of step 0"):
                follow(bank)


def test_every_step_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = entry("grouped")
    monkeypatch.setenv("ADASKIP_CHECK", "1")
    before = bank.runtime.checker.compared
    with bank.using(bank.plan(["1.ffn"], ["0.ffn"])):
        follow(bank)
    assert bank.runtime.checker.compared == before + len(steps(bank.model))


def test_the_last_token_in_full() -> None:
    bank = entry("grouped")
    plan = bank.plan(["0.ffn"])
    full = replace(plan, decode=SkipPlan.empty(plan.sublayers).decode, last_token_full=True)
    embedded, reference = drawn(bank.model, rows=1), bank.reference_cache()
    with bank.using(full), torch.no_grad():
        got = bank.compiled(inputs_embeds=embedded).logits
        parts = [
            bank.oracle.model(inputs_embeds=e, past_key_values=reference).logits
            for e in (embedded[:, :-1], embedded[:, -1:])
        ]
    assert_close(got, torch.cat(parts, 1), 1e-5, "logits")


def test_hidden_states_begin_with_the_embeddings() -> None:
    bank = entry("grouped")
    embedded = drawn(bank.model)
    with bank.using(bank.plan(["0.ffn"])), torch.no_grad():
        given = {"inputs_embeds": embedded, "output_hidden_states": True}
        got = bank.compiled(**given).hidden_states
        want = bank.oracle.model(**given).hidden_states
    assert torch.equal(got[0], embedded)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert_close(one, other, 1e-5, f"hidden state {i}")


def measured(bank: Entry, *given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a decode window has measured of some steps after a prompt [probed, B, 5]."""
    cache = bank.runtime.new_cache(stop_tokens=torch.tensor([7]))
    with torch.no_grad():
        bank.compiled(IDS, past_key_values=cache)
        for one in given:
            bank.compiled(**one, past_key_values=cache)
    window = cache.request.window
    assert window.steps == len(given)
    statistics: torch.Tensor = window.statistics
    return statistics


def test_a_window_measures_embeddings_that_are_decoded() -> None:
    """A single one on a filled cache is a decode step, and says what its id says."""
    bank, names = entry("grouped"), ("0.attention", "0.ffn", "1.attention", "1.ffn")
    profile = profile_of(bank, dict.fromkeys(names, 0.9))
    ids = IDS[:, :1]
    with bank.using(bank.plan(["0.attention"]), AdaSkip(window=9), profile):
        want = measured(bank, {"input_ids": ids}, {"input_ids": ids})
        embedded = bank.model.get_input_embeddings()(ids).detach()
        got = measured(bank, {"inputs_embeds": embedded}, {"input_ids": ids})
        assert_close(got, want, 1e-5, "moments")
        other = measured(bank, {"inputs_embeds": -embedded}, {"input_ids": ids})
        with pytest.raises(AssertionError, match="moments"):  # the companion
            assert_close(other, want, 1e-5, "moments")


def test_generate_ahead_of_the_host() -> None:
    bank = entry("grouped")
    options = {"inputs_embeds": drawn(bank.model), "max_new_tokens": 6, "do_sample": False}
    with bank.using(), running_ahead(bank):
        got = bank.compiled.generate(**options)
    assert torch.equal(got, bank.model.generate(**options))


def test_gradients_end_there(caplog: pytest.LogCaptureFixture) -> None:
    bank = entry("grouped")
    embedded = drawn(bank.model).requires_grad_(True)
    checked_call._say_detached.cache_clear()
    with bank.using(), caplog.at_level(logging.WARNING, logger="adaskip_fx"):
        assert not bank.compiled(inputs_embeds=embedded).logits.requires_grad
    assert "what it returns is detached" in caplog.text


# What is refused --------------------------------------------------------------------------------


class Scaled(LlamaForCausalLM):  # type: ignore[misc]
    """Makes of ids more than its embeddings are."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):  # type: ignore[no-untyped-def]
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids) * 2.0
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class ByIds(LlamaForCausalLM):  # type: ignore[misc]
    """Takes ids alone."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(input_ids, attention_mask, past_key_values=past_key_values, **kwargs)


def of_class(kind: Any) -> Any:
    plain = make_model("one_layer")
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


def test_a_model_that_makes_more_of_ids_is_refused() -> None:
    """What ids give is known of it; what embeddings should give is not."""
    pair = Pair(of_class(Scaled))
    with pytest.raises(UnsupportedError, match="prefill gives other logits than the model"):
        pair.check(drawn(pair.model))
    with torch.no_grad():
        assert_close(pair.compiled(IDS).logits, pair.model(IDS).logits, 1e-5, "logits")


def test_a_forward_without_embeddings_is_refused() -> None:
    pair = Pair(of_class(ByIds))
    with pytest.raises(NotImplementedError, match=r"forward\(inputs_embeds=...\) is not supported"):
        pair.check(drawn(pair.model))


def test_a_choice_by_ids_is_refused() -> None:
    bank = entry("grouped")
    empty = bank.plan()
    width = bank.model.config.hidden_size
    choice = Choice(
        (
            Option("a", empty, (1.0,) * width),
            Option("b", bank.plan(["0.ffn"]), (0.0,) * (width - 1) + (1.0,)),
        )
    )
    with bank.using(), torch.no_grad():
        bank.runtime.plan = choice
        with pytest.raises(
            NotImplementedError, match="takes a plan by the ids of the first prompt"
        ):
            bank.compiled(inputs_embeds=drawn(bank.model))
        cache = bank.compiled.adaskip.new_cache(plan=empty)
        got = bank.compiled(inputs_embeds=drawn(bank.model), past_key_values=cache).logits
        assert_close(got, bank.model(inputs_embeds=drawn(bank.model)).logits, 1e-5, "logits")
