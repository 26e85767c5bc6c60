"""Instruments belong to a request: two of them do not see each other, and nobody else is slowed."""

from __future__ import annotations

import pytest
import torch

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.programs.instruments import Instrument, ResidualRecorder
from tests.support.compiled_llamas import Entry, entry
from tests.support.eager_reference import assert_close

SHAPE = "three_layers"


def eager_streams(bank: Entry, ids: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream before the first sublayer and after each, by hooks."""
    bank.oracle.behave({})
    bank.oracle.step(ids, bank.reference_cache())
    pairs = [bank.oracle.streams[str(s)] for s in bank.sublayers]
    return [pairs[0][0], *(after for _, after in pairs)]


def test_each_request_is_recorded_by_itself() -> None:
    bank = entry(SHAPE)
    recorders = ResidualRecorder(), ResidualRecorder()
    prompts = bank.tokens(1, 5, 1), bank.tokens(1, 7, 2)
    caches = [bank.runtime.new_cache(instrument=recorder) for recorder in recorders]
    plain = bank.runtime.new_cache()
    links = bank.runtime.counters.links
    with torch.no_grad():
        for cache, ids in zip(caches, prompts, strict=True):
            bank.compiled(ids, past_key_values=cache)
        bank.compiled(prompts[0], past_key_values=plain)
    assert bank.runtime.counters.links <= links + 2, "both have the same program"
    for recorder, ids in zip(recorders, prompts, strict=True):
        expected = eager_streams(bank, ids)
        assert len(recorder.streams) == len(expected) == 7
        for got, want in zip(recorder.streams, expected, strict=True):
            assert_close(got, want.reshape(got.shape), bank.tolerance)
    with pytest.raises(AssertionError):  # the companion
        assert_close(recorders[0].streams[3], recorders[0].streams[2], bank.tolerance)


def test_an_instrument_stays_with_its_request() -> None:
    bank = entry(SHAPE)
    recorder = ResidualRecorder()
    cache = bank.runtime.new_cache(instrument=recorder)
    with torch.no_grad():
        bank.compiled(bank.tokens(1, 5), past_key_values=cache)
        first = recorder.streams
        bank.compiled(bank.tokens(1, 1), past_key_values=cache)
        assert recorder.streams[0].shape[1] == 1
        cache.reset()
        bank.compiled(bank.tokens(1, 5), past_key_values=cache)
    assert_close(recorder.streams[-1], first[-1], 0.0)
    assert cache.request.instrument is recorder
    assert not cache.request.learns, "what it measures is not what the policy asked for"
    assert bank.runtime.new_cache().request.learns


def test_one_that_does_nothing_changes_nothing() -> None:
    bank = entry(SHAPE)
    ids, links = bank.tokens(1, 5), bank.runtime.counters.links
    with torch.no_grad():
        plain = bank.compiled(ids, past_key_values=bank.runtime.new_cache()).logits
        links = bank.runtime.counters.links
        cache = bank.runtime.new_cache(instrument=Instrument())
        logits = bank.compiled(ids, past_key_values=cache).logits
    assert torch.equal(plain, logits)
    assert bank.runtime.counters.links == links


def recorded(bank: Entry, plan: SkipPlan, instrument: ResidualRecorder) -> list[torch.Tensor]:
    cache = bank.runtime.new_cache(plan=plan, instrument=instrument)
    with torch.no_grad():
        bank.compiled(bank.tokens(1, 6), past_key_values=cache)
    return list(instrument.streams)


def test_programs_of_an_instrument_are_told_apart_by_their_plan() -> None:
    bank, recorder = entry(SHAPE), ResidualRecorder()
    full, skipping = recorded(bank, bank.plan(), recorder), bank.plan(["1.ffn"])
    less = recorded(bank, skipping, recorder)
    assert torch.equal(less[3], full[3])
    assert torch.equal(less[4], less[3]), "1.ffn is skipped"
    assert not torch.equal(full[4], full[3])


def test_an_instrument_under_another_ones_key_gets_the_wrong_program() -> None:
    """The near miss: with the key of one that does nothing it records nothing."""

    class Mistaken(ResidualRecorder):
        key = Instrument().key

    bank = entry(SHAPE)
    plan = bank.plan(["2.attention"])
    cache = bank.runtime.new_cache(plan=plan, instrument=Instrument())
    with torch.no_grad():
        bank.compiled(bank.tokens(1, 6), past_key_values=cache)
    assert recorded(bank, plan, Mistaken()) == []
    assert len(recorded(bank, plan, ResidualRecorder())) == 7
