"""What a request remembers: its plans step by step, and plans that it cannot run."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan
from adaskip_fx.policies import AdaSkip
from adaskip_fx.runtime.request import Request
from adaskip_fx.runtime.window import DecodePlans, Learner, Window
from tests.support.compiled_llamas import entry, profile_of
from tests.support.decisions import EMPTY, NAMES, SHAPE, SUBLAYERS
from tests.support.eager_reference import assert_close

PLAN = SkipPlan.of(SUBLAYERS, ["0.ffn"])
SIMILARITY = dict(zip(NAMES, [0.1, 0.5, 0.2, 0.9, 0.3, 0.4], strict=True))


def reading(*cosines: float) -> torch.Tensor:
    """The statistics of one token whose sublayers have these similarities."""
    rows = [[c, 1.0, 1.0, 1.0, 1.0] for c in cosines]
    return torch.tensor(rows).unsqueeze(1)


def learner(**options: Any) -> Learner:
    return Learner(AdaSkip(**options), profile_of(entry(SHAPE), SIMILARITY))


def test_a_turn_learns_once_its_window_has_closed() -> None:
    decode = DecodePlans(PLAN)
    decode.learn_with(learner(window=2))
    assert [str(s) for s in decode.probed] == ["1.ffn", "2.ffn"]
    decode.learn(reading(0.95, 0.2))
    assert decode.learning
    assert decode.plan is PLAN
    decode.learn(reading(0.95, 0.2))
    assert not decode.learning
    assert decode.probed == ()
    assert {str(s) for s in decode.plan.skipped("decode")} == {"0.ffn", "1.ffn"}


def test_a_copy_learns_by_itself() -> None:
    decode = DecodePlans(PLAN)
    decode.learn_with(learner(window=2))
    decode.learn(reading(0.95, 0.2))
    twin = decode.copy()
    twin.learn(reading(0.95, 0.2))
    assert decode.plan is PLAN
    assert twin.plan is not PLAN
    decode.learn(reading(-0.95, 0.2))
    assert decode.plan == PLAN


@pytest.mark.parametrize(
    ("plan", "options"),
    [(EMPTY, {}), (PLAN, {"online": False}), (SkipPlan.of(SUBLAYERS, NAMES[1::2]), {})],
    ids=["nothing to compare with", "off by the policy", "no ffn runs"],
)
def test_where_nothing_can_be_learned(plan: SkipPlan, options: dict[str, Any]) -> None:
    decode = DecodePlans(plan)
    decode.learn_with(learner(**options))
    assert decode.window is None
    assert decode.probed == ()
    with pytest.raises(ValueError, match="this turn measures nothing"):
        decode.learn(reading(0.5))


def test_nothing_is_learned_beside_a_schedule() -> None:
    decode = DecodePlans(
        Schedule(((0, PLAN), (2, SkipPlan.of(SUBLAYERS, ["0.ffn"], decode_extra=["1.ffn"]))))
    )
    decode.learn_with(learner())
    assert decode.window is None
    assert [len(decode.at(step).skipped("decode")) for step in range(4)] == [1, 1, 2, 2]


def test_a_window_of_nothing_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="nothing was measured in this window yet"):
        Window((SUBLAYERS[1],), 2).read()


def test_a_plan_whose_memory_was_not_stored_is_refused() -> None:
    """It ran into attention without buffers, which said "device type meta"."""
    request = Request(SkipPlan.of(SUBLAYERS, ["1.attention", "2.attention", "1.ffn"]))
    words = "this request stores nothing for 1.attention, 2.attention, which its prompts skip, so"
    with pytest.raises(PlanError, match=re.escape(words)):
        request.decode_with(EMPTY)
    request.decode_with(SkipPlan.of(SUBLAYERS, ["1.attention", "2.attention"]))


@pytest.mark.parametrize("scheduled", [False, True])
def test_decoding_with_another_plan_learns_nothing(scheduled: bool) -> None:
    bank = entry(SHAPE)
    other = SkipPlan.of(SUBLAYERS, [], decode_extra=["1.ffn"])
    begun = Schedule(((0, EMPTY), (1, SkipPlan.of(SUBLAYERS, [], decode_extra=["2.ffn"]))))
    cache = bank.runtime.new_cache(plan=begun if scheduled else EMPTY)
    reference, ids = bank.reference_cache(), bank.tokens(1, 5)
    bank.oracle.behave({})
    with torch.no_grad():
        bank.oracle.step(ids, reference)
        bank.compiled(ids, past_key_values=cache)
        cache.request.decode_with(other)
        bank.oracle.behave({}, {"1.ffn": "skip"})
        for seed in range(3):
            token = bank.tokens(1, 1, seed)
            expected = bank.oracle.step(token, reference)
            logits = bank.compiled(token, past_key_values=cache).logits
            assert_close(logits, expected, bank.tolerance, f"step {seed}")
    assert cache.request.window is None
    bank.oracle.behave({})


def test_other_rows_have_their_offsets() -> None:
    """One of each text, however many beams it has."""
    request = Request(SkipPlan.empty(SUBLAYERS))
    request.offsets = torch.tensor([[-3], [-5]])
    rows = request.of_rows(torch.tensor([3, 0, 2]), 4)
    assert rows.offsets is not None
    assert rows.offsets.tolist() == [[-5], [-3], [-5]]
    assert request.new_turn().offsets is request.offsets
