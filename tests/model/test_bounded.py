"""Tokens of a plan within a bound of divergence, measured afterwards at every token.

The plan leaves out the last FFN alone: then keys and values of all layers are the full model's, and
what drafts are chosen by is what the eager model without that FFN says of the whole text.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from adaskip_fx.plans.decisions import left_out
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.speculation.divergence import Within
from adaskip_fx.speculation.options import Bounded
from adaskip_fx.speculation.skipped import Skipped
from adaskip_fx.speculation.speculation import Speculation
from tests.support.compiled_llamas import stored
from tests.support.drafts import Drafting, drafting
from tests.support.eager_reference import Oracle

NEW = 43  # the first, and six blocks of six with a token of the full model's after each


def bank() -> Drafting:
    return drafting()


@functools.cache
def without() -> Oracle:
    """The eager model without its last FFN."""
    return Oracle(bank().model)


def generated(ids: torch.Tensor, most: float, longest: int = 6, **options: Any) -> tuple[Any, Any]:
    """What is generated within a bound, and what is counted."""
    model = bank()
    plan = SkipPlan.of(model.runtime.sublayers, ["1.ffn"])
    decoding = Bounded((Skipped(),), longest, adaptive=False, max_divergence=most)
    model.runtime.speculation = Speculation(decoding, plan)
    torch.manual_seed(0)
    tokens = model.fast.generate(ids, **{**greedily(ids), **options})
    return tokens, model.runtime.speculation.stats


def greedily(ids: torch.Tensor) -> dict[str, Any]:
    """Return what ``generate`` is given besides."""
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return {**given, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def eager(text: torch.Tensor, skip: bool) -> torch.Tensor:
    """Logits of the tokens after the prompt, each given those before it, by the eager model."""
    oracle = without()
    oracle.behave(*([{"1.ffn": "skip"}] * 2) if skip else ({}, {}), {})
    try:
        logits: torch.Tensor = oracle.model(text).logits[:, -NEW - 1 : -1]
    finally:
        oracle.behave({})
    return logits


def measured(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(full || draft) [B, NEW] of a text, and which tokens the full model would have chosen."""
    full, draft = (eager(text, skip) for skip in (False, True))
    ours, theirs = torch.log_softmax(full, -1), torch.log_softmax(draft, -1)
    return (ours.exp() * (ours - theirs)).sum(-1), full.argmax(-1) == text[:, -NEW:]


@pytest.mark.parametrize("most", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_mean_is_within_the_bound(most: float, batch: int) -> None:
    text, counted = generated(bank().tokens(batch, 9, 4), most)
    apart, same = measured(text)
    paid_at_least = (apart * ~same).sum(1)
    assert (paid_at_least <= most * NEW * (1 + 1e-4)).all()
    assert counted.worst <= most * (1 + 1e-6)
    total = counted.divergence * NEW * batch
    assert paid_at_least.sum() - 1e-4 <= total <= apart.sum() + 1e-4
    assert counted.bound == most


@pytest.mark.breaks
def test_a_bound_that_is_not_kept_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: what was spent is forgotten."""
    settle = Within.settle

    def forgets(self: Within, columns: int) -> None:
        settle(self, columns)
        self.spent = torch.zeros_like(self.spent)

    monkeypatch.setattr(Within, "settle", forgets)
    with pytest.raises(AssertionError):
        test_the_mean_is_within_the_bound(0.2, 3)


def test_a_bound_that_is_never_reached_gives_the_plans_own_tokens() -> None:
    ids = bank().tokens(1, 9, 4)
    text, counted = generated(ids, 1e6)
    apart, same = measured(text)
    blocks = counted.proposers["skipped"]
    assert blocks.accepted == blocks.drafted
    drafted = torch.ones(NEW, dtype=torch.bool)
    drafted[:: 1 + 6] = False  # the first, and the one after each block, are the full model's
    assert same[0, ~drafted].all()
    assert not same[0, drafted].all()
    assert torch.equal(eager(text, True).argmax(-1)[0, drafted], text[0, -NEW:][drafted])
    assert counted.divergence == pytest.approx(apart[0, drafted].sum().item() / NEW, rel=1e-4)


def frontier(skipped: Sequence[Sequence[str]], most: float) -> tuple[Any, Any, list[SkipPlan]]:
    """Like `generated`, but with weaker plans; returns these plans as well, the strongest first."""
    model, ids = bank(), bank().tokens(1, 9, 4)
    plans = [SkipPlan.of(model.runtime.sublayers, names) for names in skipped]
    decoding = Bounded((Skipped(plans[0], tuple(plans[1:])),), 6, False, max_divergence=most)
    model.runtime.speculation = Speculation(decoding, plans[0])
    tokens = model.fast.generate(ids, **greedily(ids))
    return tokens, model.runtime.speculation.stats, plans


def test_a_plan_that_spends_too_fast_is_weakened(caplog: pytest.LogCaptureFixture) -> None:
    """By a link: the second time nothing is linked, and nothing is ever captured for it."""
    bank().fast.adaskip.warmup(60)
    frontier([["1.ffn"]], 0.02)
    before = bank().fast.adaskip.stats()
    with caplog.at_level(logging.INFO, "adaskip_fx.speculation"):
        _, counted, plans = frontier([["0.ffn", "1.ffn"], ["1.ffn"]], 0.02)
    assert counted.weakened >= 1
    assert counted.fell_back == 1
    assert counted.worst <= 0.02 * (1 + 1e-6)
    assert list(counted.proposers["skipped"].kinds) == [plan.digest[:8] for plan in plans]
    after = bank().fast.adaskip.stats()
    assert after.captures == before.captures
    assert after.links <= before.links + 1
    told = [record.getMessage() for record in caplog.records]
    weak, strong = plans[1].digest[:8], plans[0].digest[:8]
    expected = f"drafts go on with plan {weak} ({left_out(plans[1])}), since those of plan "
    assert f"{expected}{strong} diverge too much" in told
    assert "a draft was beyond the bound of 0.02 nats a token: the full" in told[0]
    assert told[-1].startswith("diverged ")
    assert told[-1].endswith(" nats a token in the worst row, of at most 0.02")
    report = str(counted)
    assert "fell back to the full program's tokens in 1 of 1 requests" in report
    assert f"  {weak}: " in report


def test_a_plan_that_does_not_is_not() -> None:
    _, counted, plans = frontier([["0.ffn", "1.ffn"], ["1.ffn"]], 1e6)
    assert (counted.weakened, counted.fell_back) == (0, 0)
    assert list(counted.proposers["skipped"].kinds) == [plans[0].digest[:8]]


def test_a_bound_of_almost_nothing_gives_the_full_models_tokens() -> None:
    ids = bank().tokens(2, 9, 4)
    text, counted = generated(ids, 1e-9)
    assert measured(text)[1].all()
    assert counted.worst <= 1e-9


def test_what_is_stored_is_the_full_models() -> None:
    output, _ = generated(bank().tokens(1, 9, 4), 1.0, return_dict_in_generate=True)
    cache = output.past_key_values
    with torch.no_grad():
        reference = bank().model(output.sequences[:, : cache.length], use_cache=True)
    for pair, layer in zip(stored(cache), reference.past_key_values.layers, strict=True):
        assert pair is not None
        for mine, theirs in zip(pair, (layer.keys, layer.values), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_sampling_and_rules_that_remember() -> None:
    from transformers import LogitsProcessorList

    class Remembers:
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores * 0.9

    ids = bank().tokens(2, 9, 4)
    _, counted = generated(ids, 0.05, do_sample=True, temperature=1.5)
    assert 0 < counted.worst <= 0.05 * (1 + 1e-6)
    assert counted.tokens == NEW
    rules = {"logits_processor": LogitsProcessorList([Remembers()])}
    got, counted = generated(ids, 0.05, **rules)
    assert counted.worst is None, "nothing stands by the bound"
    assert torch.equal(got, bank().model.generate(ids, **greedily(ids), **rules))
