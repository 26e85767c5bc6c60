"""Blocks of which a coin says whether they are verified: what is written, and what is told of it.

As in `test_bounded` the plan leaves out the last FFN alone, so K/V are the full model's and the
eager model says what every token diverges, verified or not.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from adaskip_fx.model.drafted import DraftedRequest
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.runtime.draft_with import draft_with
from adaskip_fx.speculation.options import Bounded
from adaskip_fx.speculation.proposals import Drafts
from adaskip_fx.speculation.sampled import Coin
from adaskip_fx.speculation.skipped import Skipped
from adaskip_fx.speculation.speculation import Speculation
from adaskip_fx.speculation.statistics import DraftStats
from tests.support.compiled_llamas import stored
from tests.support.drafts import Drafting, drafting
from tests.support.eager_reference import Oracle

PROMPT, NEW, BLOCK, CLIP = 9, 41, 4, 0.05


def bank() -> Drafting:
    return drafting()


@functools.cache
def oracle() -> Oracle:
    """The eager model without its last FFN."""
    return Oracle(bank().model)


def decoding(share: float, most: float = 1e6) -> Bounded:
    options = {"max_divergence": most, "verify_share": share, "clip": CLIP}
    return Bounded((Skipped(),), BLOCK, adaptive=False, **options)


@dataclass
class Ran:
    """A request: what it gave and counted, and its blocks.

    Of each: how many tokens there were before it, how many it drafts, whether it was verified.
    """

    output: Any
    stats: DraftStats
    blocks: list[tuple[int, int, bool]]


@contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, bool]]]:
    blocks = list[tuple[int, int, bool]]()
    verify, release = DraftedRequest._verify, DraftedRequest._release

    def verified(self: Any, drafts: Drafts) -> Any:
        blocks.append((self.input_ids.shape[1], drafts.count, True))
        return verify(self, drafts)

    def released(self: Any, drafts: Drafts, *args: Any) -> Any:
        blocks.append((self.input_ids.shape[1], drafts.count, False))
        return release(self, drafts, *args)

    with patch.context() as meanwhile:
        meanwhile.setattr(DraftedRequest, "_verify", verified)
        meanwhile.setattr(DraftedRequest, "_release", released)
        yield blocks


def generated(
    patch: pytest.MonkeyPatch, share: float, seed: int = 0, most: float = 1e6, **options: Any
) -> Ran:
    model, ids = bank(), bank().tokens(options.pop("rows", 1), PROMPT, 4)
    plan = SkipPlan.of(model.runtime.sublayers, ["1.ffn"])
    model.runtime.speculation = found = Speculation(decoding(share, most), plan)
    torch.manual_seed(seed)
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    with watched(patch) as blocks:
        output = model.fast.generate(ids, attention_mask=torch.ones_like(ids), **given)
    return Ran(output, found.stats, blocks)


@torch.no_grad()
def logits(text: torch.Tensor, skip: bool) -> torch.Tensor:
    """Of all tokens but the first, each given those before it, by the eager model."""
    oracle().behave(*([{"1.ffn": "skip"}] * 2) if skip else ({}, {}), {})
    try:
        found: torch.Tensor = oracle().model(text).logits[:, :-1]
    finally:
        oracle().behave({})
    return found


def apart(text: torch.Tensor) -> torch.Tensor:
    """KL(full || draft) of each token of a text but the first, at most CLIP."""
    full, draft = (torch.log_softmax(logits(text, skip), -1) for skip in (False, True))
    return (full.exp() * (full - draft)).sum(-1).clamp_max(CLIP)


def drafted(ran: Ran, verified: bool) -> list[int]:
    """The places of tokens that were drafted, in blocks of that kind."""
    places = [range(at, at + count) for at, count, v in ran.blocks if v is verified]
    return [place for block in places for place in block]


# What is written ---------------------------------------------------------------------------------


def test_tokens_are_the_plans_own_and_the_cache_has_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = generated(monkeypatch, 1e-9, return_dict_in_generate=True)
    text, cache = ran.output.sequences, ran.output.past_key_values
    assert [verified for *_, verified in ran.blocks].count(True) == 1, "the first one"
    places = drafted(ran, verified=False)
    assert len(places) >= NEW - 3 - BLOCK
    choice = logits(text, skip=True).argmax(-1)[0]
    assert all(choice[place - 1] == text[0, place] for place in places)
    with torch.no_grad():
        reference = bank().model(text[:, : cache.length], use_cache=True).past_key_values
    for pair, layer in zip(stored(cache), reference.layers, strict=True):
        assert pair is not None
        for mine, theirs in zip(pair, (layer.keys, layer.values), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.breaks
def test_a_cache_that_is_rolled_back_too_far_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    release = DraftedRequest._release

    def forgets(self: Any, drafts: Any, given: Any) -> Any:
        self.cache.keep_first(self.cache.length - 1)
        return release(self, drafts, given)

    monkeypatch.setattr(DraftedRequest, "_release", forgets)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        test_tokens_are_the_plans_own_and_the_cache_has_theirs(monkeypatch)


def test_rows_that_end_and_what_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    free = generated(monkeypatch, 0.5, rows=3).output
    eos = int(free[1, PROMPT + 17])
    ran = generated(monkeypatch, 0.5, rows=3, eos_token_id=eos, output_logits=True)
    for row in ran.output[:, PROMPT:].tolist():
        assert eos not in row or set(row[row.index(eos) + 1 :]) <= {0}
    assert ran.stats.tokens == ran.output.shape[1] - PROMPT
    sampled = generated(monkeypatch, 0.5, do_sample=True, temperature=1.5)
    assert sampled.output.shape == (1, PROMPT + NEW)


def test_where_the_estimate_is_beyond_the_bound_every_block_is_verified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = generated(monkeypatch, 0.5, most=1e-9)
    assert all(verified for *_, verified in ran.blocks)
    assert ran.stats.unverified == 0
    full = logits(ran.output, skip=False).argmax(-1)[0, PROMPT - 1 :]
    assert torch.equal(full, ran.output[0, PROMPT:])


# What is told of it ------------------------------------------------------------------------------


def many(patch: pytest.MonkeyPatch) -> list[tuple[float, float, float]]:
    """Of requests with other coins: true mean, estimate and upper bound."""
    found = []
    for seed in range(16):
        ran = generated(patch, 0.5, seed)
        costs = apart(ran.output)[0].tolist()
        places = drafted(ran, True) + drafted(ran, False)
        true = sum(costs[place - 1] for place in places) / NEW
        assert ran.stats.estimate is not None
        assert ran.stats.upper is not None
        found.append((true, ran.stats.estimate, ran.stats.upper))
    return found


def is_unbiased(found: list[tuple[float, float, float]]) -> bool:
    errors = [estimate - true for true, estimate, _ in found]
    return abs(statistics.mean(errors)) < 4 * statistics.stdev(errors) / len(errors) ** 0.5


def test_the_estimate_is_right_on_average_and_the_bound_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adaskip_fx.speculation.divergence.divergence", clipped)
    found = many(monkeypatch)
    assert is_unbiased(found)
    assert all(true <= upper for true, _, upper in found), "5 of 100 may be above"
    assert statistics.stdev(estimate for _, estimate, _ in found) > 0


def clipped(full: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """So that verified tokens as well count as those of blocks that are not."""
    ours, theirs = torch.log_softmax(full, -1), torch.log_softmax(draft, -1)
    return (ours.exp() * (ours - theirs)).sum(-1).clamp(0, CLIP)


@pytest.mark.breaks
def test_a_coin_that_is_not_counted_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: what is seen is taken for all there is."""
    verified = Coin.verified

    def forgets(self: Any, *args: Any) -> None:
        share, self._share = self._share, 1.0
        verified(self, *args)
        self._share = share

    monkeypatch.setattr(Coin, "verified", forgets)
    monkeypatch.setattr("adaskip_fx.speculation.divergence.divergence", clipped)
    assert not is_unbiased(many(monkeypatch))


def test_the_report_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = generated(monkeypatch, 0.5).stats
    assert stats.unverified > 0
    assert f"{stats.unverified} tokens not verified; in the worst row the mean is about" in str(
        stats
    )
    assert "by confidence, at most" in str(stats)


# Refusals ----------------------------------------------------------------------------------------


def test_a_plan_that_writes_no_keys_is_refused() -> None:
    runtime = bank().runtime
    plan = SkipPlan.of(runtime.sublayers, ["1.attention"])
    with pytest.raises(ValueError, match=r"K/V of drafts stay, but the plan skips attention \(.*1"):
        draft_with(runtime, Bounded((Skipped(plan),), verify_share=0.5))


@pytest.mark.parametrize(
    "options", [{"verify_share": 0.0}, {"verify_share": 1.1}, {"clip": 0.0}, {"error": 1.0}]
)
def test_options_that_mean_nothing(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=...\\) must be"):
        Bounded(**options)  # type: ignore[arg-type]
